#!/usr/bin/env bash
# A W&B sweep whose trials are runs on all nodes of this job; the agent runs on the batch host.
#   wandb sweep sweeps/noise_schedule.yaml        prints ENTITY/PROJECT/SWEEP
#   sbatch slurm/sweep.sh ENTITY/PROJECT/SWEEP batch.size=16      with overrides for every trial; here one clip per rank
# A restart of the job resumes the same trial. Several jobs may share a sweep.
#SBATCH --job-name=svd-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
. "$SLURM_SUBMIT_DIR/slurm/lib.sh"

exec_python tools/sweep.py "${JOB[@]}" -- "$@"
