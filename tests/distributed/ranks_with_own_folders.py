"""The trainer with a run folder for each rank: RANK in an argument is the rank's number."""

from __future__ import annotations

import os
import sys

from svd_ds import train

if __name__ == "__main__":
    sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv]
    train.main()
