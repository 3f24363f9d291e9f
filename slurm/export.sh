#!/usr/bin/env bash
# Megatron checkpoint -> Hugging Face, proved. As many tasks as model.tensor_model_parallel_size x pipeline's.
#   sbatch slurm/export.sh [overrides]
# e.g. sbatch slurm/export.sh checkpoint=runs/ppo out=DIR model.tensor_model_parallel_size=8
#SBATCH --job-name=her-nemo-export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
set -euo pipefail
# shellcheck source=slurm/common.sh
source "${HER_NEMO_REPO:-${SLURM_SUBMIT_DIR:?run this through sbatch}}/slurm/common.sh"
her_nemo_job export "$@"
