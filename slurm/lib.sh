# Shared by the job scripts: sourced, not run. Needs an allocation (SLURM_JOB_ID).
# The settings of a site (modules, NCCL, paths) are in slurm/site.env; see slurm/site.env.example.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this with sbatch from the root of the repository}"
# The time is almost up, or the job is preempted (--signal=B:USR1@...).
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
if [ -f slurm/site.env ]; then
  set +u # modules and conda read unset variables
  # shellcheck disable=SC1091
  . slurm/site.env
  set -u
fi
PYTHON=${SVD_DS_PYTHON:-.venv/bin/python}
CPUS=${SLURM_CPUS_PER_TASK:-1}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
MASTER_ADDR=${NODES%%,*}
# A port for each restart, below the ephemeral range: jobs can share a node, and processes of an earlier restart may
# still listen on theirs.
MASTER_PORT=$((15000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 15000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG

# Options of tools/job.py and tools/sweep.py; SVD_DS_JOB_OPTIONS has those of the site, such as --no-preflight or --no-plan.
JOB=(--job "$SLURM_JOB_ID" --nodes "$NODES" --cpus "$CPUS" --gpus "${SLURM_GPUS_ON_NODE:-0}" ${SVD_DS_JOB_OPTIONS:-})

exec_python() {  # exec_python SCRIPT ARGUMENT...: replace this process, which Slurm signals
  trap '' USR1 # until Python handles it; by default it would end the process
  exec "$PYTHON" "$@"
}

run_training() {  # run_training ARGUMENT...: one srun task per rank, all with the same arguments; restarted if a rank dies
  exec_python tools/job.py "${JOB[@]}" -- "$@"
}

can_requeue() {  # true if the job may be requeued once more
  [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]
}

run_tasks() {  # run_tasks SCRIPT ARGUMENT...: one srun task per rank of a script that resumes by itself when restarted
  local code=0
  if can_requeue; then
    "$PYTHON" tools/check_nodes.py "${JOB[@]}" &
    wait $! || exit
  fi
  # The tasks do not wait for each other: when one dies, the others finish their work.
  srun --kill-on-bad-exit=0 --cpus-per-task="$CPUS" "$PYTHON" "$@" &
  wait $! || code=$?
  # 2: a user's mistake, which a restart would repeat. A job that no longer runs is left to Slurm, or requeued already.
  if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && can_requeue &&
    [[ "$(scontrol show job -o "$SLURM_JOB_ID")" == *JobState=RUNNING* ]]; then
    echo "job $SLURM_JOB_ID is requeued: srun ended with $code"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

run_stage() {  # run_stage NAME [EXPERIMENT] [key=value ...]: the experiment NAME, unless the first argument names another
  local name=$1
  shift
  case "${1:-}" in
    "" | -* | *=*) ;;
    *) name=$1; shift ;;
  esac
  run_training "+experiment=$name" "$@"
}
