# Shared by the job scripts: sourced, not run. Needs an allocation (SLURM_JOB_ID).
# A site's own settings (modules, NCCL, paths) stand in slurm/site.env; see slurm/site.env.example.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this with sbatch from the root of the repository}"
# The time is almost up, or the job is preempted (--signal=B:USR1@...).
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
if [ -f slurm/site.env ]; then
  set +u # modules and conda read variables that nobody has set
  # shellcheck disable=SC1091
  . slurm/site.env
  set -u
fi
PYTHON=${SVD_DS_PYTHON:-.venv/bin/python}
CPUS=${SLURM_CPUS_PER_TASK:-1}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
MASTER_ADDR=${NODES%%,*}
# A port of this life's own, below those that the system hands out: jobs can share a node, and what an earlier life
# left on one is not met.
MASTER_PORT=$((15000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 15000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG

# What tools/job.py and tools/sweep.py are told of the job; SVD_DS_JOB_OPTIONS: the site's own, as --no-preflight.
JOB=(--job "$SLURM_JOB_ID" --nodes "$NODES" --cpus "$CPUS" --gpus "${SLURM_GPUS_ON_NODE:-0}" ${SVD_DS_JOB_OPTIONS:-})

exec_python() {  # exec_python SCRIPT ARGUMENT...: Slurm signals this process, and what it becomes answers
  trap '' USR1 # while Python starts it would be the end
  exec "$PYTHON" "$@"
}

run_training() {  # run_training ARGUMENT...: one srun task a rank, all ranks with the same arguments; lives on after a death
  exec_python tools/job.py "${JOB[@]}" -- "$@"
}

can_requeue() {  # whether the job may be queued again once more
  [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]
}

run_tasks() {  # run_tasks SCRIPT ARGUMENT...: one srun task a rank of a script that goes on by itself when started again
  local code=0
  if can_requeue; then
    "$PYTHON" tools/check_nodes.py "${JOB[@]}" &
    wait $! || exit
  fi
  # They do not wait for each other: when one dies, the others finish what they have.
  srun --kill-on-bad-exit=0 --cpus-per-task="$CPUS" "$PYTHON" "$@" &
  wait $! || code=$?
  # 2: a mistake, which would be made again. A job that does not run any more is Slurm's, or queued already.
  if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && can_requeue &&
    [[ "$(scontrol show job -o "$SLURM_JOB_ID")" == *JobState=RUNNING* ]]; then
    echo "job $SLURM_JOB_ID is queued again: srun ended with $code"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

run_stage() {  # run_stage NAME [EXPERIMENT] [key=value ...]: the experiment NAME, or another that is named first
  local name=$1
  shift
  case "${1:-}" in
    "" | -* | *=*) ;;
    *) name=$1; shift ;;
  esac
  run_training "+experiment=$name" "$@"
}
