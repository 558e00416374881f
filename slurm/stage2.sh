#!/usr/bin/env bash
# Video pretraining at 14 x 256x384, then at 14 x 320x576, on the paper's 48 nodes of 8 A100.
#   sbatch slurm/stage2.sh data.path=/shared/shards frozen.path=/shared/sd21 init.from=runs/stage1
#   sbatch slurm/stage2.sh stage2_highres data.path=/shared/shards frozen.path=/shared/sd21 init.from=runs/stage2
#   sbatch --nodes=2 --account=me slurm/stage2.sh debug=tiny batch.size=16      any #SBATCH line can be overridden
#SBATCH --job-name=svd-stage2
#SBATCH --nodes=48
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

run_stage stage2 "$@"
