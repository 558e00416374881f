"""Imported by every Python process that has this folder on its PYTHONPATH: rank 1 of a job's first start of
the trainer computes a step wrongly, once. FAULTS: as tests/distributed/faulty_ranks.py takes them."""

import os
import sys

if "svd_ds.train" in sys.orig_argv and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from tests.distributed.faulty_ranks import plant

    plant(os.environ["FAULTS"].split(","), int(os.environ["SLURM_PROCID"]))
