#!/usr/bin/env bash
# Raw videos to shards: an array of jobs, each a part of the files, and one more for what needs all parts.
#   parts=$(sbatch --parsable --array=0-15 slurm/curate.sh /shared/raw /shared/curated --size 320)
#   sbatch --dependency=afterok:$parts slurm/curate.sh /shared/raw /shared/curated --size 320
# Both take the same arguments. A part that was killed goes on where it was when it is submitted again.
#SBATCH --job-name=svd-curate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out
. "$SLURM_SUBMIT_DIR/slurm/lib.sh"

part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  part=(--part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
fi
tasks tools/curate.py "$@" --workers "$CPUS" "${part[@]}"
