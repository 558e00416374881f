#!/usr/bin/env bash
# Latents for shards, one task per GPU; each resumes with its first unfinished shard when restarted.
#   sbatch slurm/encode.sh /shared/shards /shared/shards-latents --size 320x576 --frozen /shared/svd
#SBATCH --job-name=svd-encode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
. "$SLURM_SUBMIT_DIR/slurm/lib.sh"

run_tasks tools/encode.py "$@"
