#!/usr/bin/env bash
# The image stages, which train the network without its temporal layers.
#   sbatch slurm/stage1.sh stage1_time_embed data.path=/shared/images frozen.path=/shared/sd21 init.from=/shared/sd21
#   sbatch slurm/stage1.sh data.path=/shared/images frozen.path=/shared/sd21 init.from=runs/stage1_time_embed
#SBATCH --job-name=svd-stage1
#SBATCH --nodes=8
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

run_stage stage1 "$@"
