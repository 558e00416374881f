#!/usr/bin/env bash
# Raw videos to shards: an array of jobs, one per part of the files, and one more job for stages that need all parts.
#   parts=$(sbatch --parsable --array=0-15 slurm/curate.sh /shared/raw /shared/curated --size 320 --part %a/16)
#   sbatch --dependency=afterok:$parts slurm/curate.sh /shared/raw /shared/curated --size 320
# %a is replaced by the number of the task in the array. A part that failed resumes when it is submitted again with the
# same arguments: --array=3,7 for two of the sixteen.
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
