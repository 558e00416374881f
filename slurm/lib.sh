# Shared by the job scripts: sourced, not run. Needs an allocation (SLURM_JOB_ID).
# A site's own settings (modules, NCCL, paths) stand in slurm/site.env; see slurm/site.env.example.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this with sbatch from the root of the repository}"
# shellcheck disable=SC1091
[ ! -f slurm/site.env ] || . slurm/site.env
PYTHON=${SVD_DS_PYTHON:-.venv/bin/python}
CPUS=${SLURM_CPUS_PER_TASK:-1}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
MASTER_ADDR=${NODES%%,*}
# A port of the job's own, so that two jobs can share a node.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG

# What tools/job.py and tools/sweep.py are told of the job; SVD_DS_JOB_OPTIONS: the site's own, as --no-preflight.
JOB=(--job "$SLURM_JOB_ID" --nodes "$NODES" --cpus "$CPUS" --gpus "${SLURM_GPUS_ON_NODE:-0}" ${SVD_DS_JOB_OPTIONS:-})

# exec, here and in sweep.sh: Slurm signals this process (--signal=B:...), and what it becomes answers.
train() {  # train ARGUMENT...: one srun task a rank, all ranks with the same arguments; lives on after a death
  exec "$PYTHON" tools/job.py "${JOB[@]}" -- "$@"
}

tasks() {  # tasks SCRIPT ARGUMENT...: one srun task a rank of a script that goes on by itself when started again
  trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
  srun --kill-on-bad-exit=1 --cpus-per-task="$CPUS" "$PYTHON" "$@" &
  wait $!
}

stage() {  # stage NAME [EXPERIMENT] [key=value ...]: the experiment NAME, or another that is named first
  local name=$1
  shift
  case "${1:-}" in
    "" | -* | *=*) ;;
    *) name=$1; shift ;;
  esac
  train "+experiment=$name" "$@"
}
