"""Write an HTML report of a run, or a comparison of several, ranked by their loss on the fixed evaluation
set."""

from __future__ import annotations

import argparse
from pathlib import Path

from svd_ds.cli import print_line, run_cli
from svd_ds.evaluation.report import write_report

EXAMPLE = """example:
  python tools/report.py runs/small
  python tools/report.py runs/noise_schedule-* --out compare.html
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="output file; default: report.html in the first RUN")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "report.html"
    for damage in write_report(arguments.runs, out):
        print_line(f"warning: {damage}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_cli(main)
