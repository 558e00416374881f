# Shared by the job scripts: sourced, not run. Needs an allocation (SLURM_JOB_ID).
# A site's own settings (modules, NCCL, paths) stand in slurm/site.env; see slurm/site.env.example.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this with sbatch from the root of the repository}"
# shellcheck disable=SC1091
[ ! -f slurm/site.env ] || . slurm/site.env

train() {  # train ARGS...: one srun task a rank, all ranks with the same arguments
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # A port of the job's own, so that two jobs can share a node.
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # --kill-on-bad-exit: one failed rank ends the step, so nobody waits in a collective for ever.
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${SVD_DS_PYTHON:-.venv/bin/python}" -m svd_ds.train "$@"
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
