#!/usr/bin/env bash
# The finetunes at 576x1024, and experiments that start from them: stage3_t2v, stage3_i2v_base, stage3_i2v, stage3_i2v_xt,
# interpolation, camera_lora, multiview. Their files in conf/experiment/ name the stage that each starts from; the
# last three have smaller batches, for fewer nodes.
#   sbatch slurm/stage3.sh stage3_i2v data.path=/shared/best frozen.path=/shared/svd init.from=runs/stage3_i2v_base
#   sbatch --nodes=8 slurm/stage3.sh interpolation data.path=/shared/best frozen.path=/shared/svd init.from=runs/stage3_t2v
#   sbatch --nodes=2 slurm/stage3.sh camera_lora data.path=/shared/zooming frozen.path=/shared/svd init.from=runs/stage3_i2v
#   sbatch --nodes=1 slurm/stage3.sh multiview data.path=/shared/orbits frozen.path=/shared/svd init.from=runs/stage3_i2v_xt
#SBATCH --job-name=svd-stage3
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

run_stage stage3_i2v "$@"
