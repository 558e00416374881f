"""Rate models by pairwise human votes: Elo with bootstrap intervals (arXiv 2311.15127, section E.3)."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from svd_ds.cli import run_cli
from svd_ds.evaluation.elo import NUM_BOOTSTRAPS, rate_models, read_votes

EXAMPLE = """example:
  python tools/elo.py votes.csv

VOTES is a csv with the columns first, second and winner: the names of two models, and of the preferred one,
or "tie". With a further column axis (quality, prompt, ...) models are rated on each axis separately."""


def main() -> None:
    arguments = parse_arguments()
    votes = read_votes(arguments.votes)
    console = Console(width=None if Console().is_terminal else 100)
    for axis in dict.fromkeys(vote.axis for vote in votes):
        table = Table("model", "elo", "95 % interval", "votes", title=axis)
        for rating in rate_models(
            [vote for vote in votes if vote.axis == axis], arguments.bootstraps, arguments.seed
        ):
            interval = f"{rating.low:.1f} to {rating.high:.1f}"
            table.add_row(rating.model, f"{rating.elo:.1f}", interval, str(rating.num_votes))
        console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("votes", type=Path, metavar="VOTES", help="csv file of votes")
    add("--bootstraps", type=int, default=NUM_BOOTSTRAPS, help="bootstrap samples; default: %(default)s")
    add("--seed", type=int, default=0, help="seed of the bootstrap; default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if arguments.bootstraps < 1:
        raise ValueError(f"--bootstraps is {arguments.bootstraps}: it must be at least 1")
    return arguments


if __name__ == "__main__":
    run_cli(main)
