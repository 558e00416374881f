"""Preflight check of a Slurm job whose tasks resume by themselves: exclude nodes that fail it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svd_ds.cli import run_cli
from svd_ds.jobs.preflight import exclude_nodes, failing_nodes
from svd_ds.jobs.slurm import Job

EXAMPLE = """slurm/encode.sh and curate.sh call it with the allocation's own values (slurm/lib.sh):
  tools/check_nodes.py --job 42 --nodes node1,node2 --gpus 8

Exit code: 0 if every node passes; 1 after the job was requeued, excluding the nodes that fail."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    Job.add_options(parser)
    job = Job.from_options(parser.parse_args())
    # The tasks share only files: the nodes need not reach each other.
    faults = failing_nodes(job, Path("runs", "jobs", job.id), together=False) if job.preflight else {}
    if not faults:
        return
    # Checks that ended with the job say nothing about its nodes.
    if job.is_running():
        exclude_nodes(job, faults)
    sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
