#!/usr/bin/env bash
# Raw videos to shards: an array of jobs, each a part of the files, and one more for what needs all parts.
#   parts=$(sbatch --parsable --array=0-15 slurm/curate.sh /shared/raw /shared/curated --size 320 --part %a/16)
#   sbatch --dependency=afterok:$parts slurm/curate.sh /shared/raw /shared/curated --size 320
# Slurm numbers the tasks of the array, and %a stands for that number. A part that failed goes on where it was when it
# is submitted again, with the same words: --array=3,7 for two of the sixteen.
#SBATCH --job-name=svd-curate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
. "$SLURM_SUBMIT_DIR/slurm/lib.sh"

number=${SLURM_ARRAY_TASK_ID:-}
if [ -n "$number" ] && [[ "$*" != *"--part %a/"* ]]; then
  echo "error: task $number of an array needs --part %a/N, or it would take all the files" >&2
  exit 2
fi
run_tasks tools/curate.py "${@//%a/$number}" --workers "$CPUS"
