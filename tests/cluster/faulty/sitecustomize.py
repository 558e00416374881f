"""Imported by every Python process with this folder on its PYTHONPATH: in the first start of a job rank 1 of
the training fails in a step, once. FAULTS has the format of tests/distributed/faulty_ranks.py."""

import os
import sys

if "svd_ds.train" in sys.orig_argv and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from tests.distributed.faulty_ranks import plant

    plant(os.environ["FAULTS"].split(","), int(os.environ["SLURM_PROCID"]))
