#!/usr/bin/env bash
# Supervised fine-tuning.
#   sbatch --nodes=4 slurm/sft.sh [overrides]
# e.g. sbatch --nodes=4 slurm/sft.sh precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true \
#        pretrained_checkpoint.restore_from_path=DIR model.data.train_ds.file_path=FILE
#SBATCH --job-name=her-nemo-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
set -euo pipefail
# shellcheck source=slurm/common.sh
source "${HER_NEMO_REPO:-${SLURM_SUBMIT_DIR:?run this through sbatch}}/slurm/common.sh"
her_nemo_job sft "$@"
