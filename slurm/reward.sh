#!/usr/bin/env bash
# The reward model: Bradley-Terry on preference pairs.
#   sbatch slurm/reward.sh [overrides]
# from the SFT run's directory: pretrained_checkpoint.restore_from_path=runs/sft
#SBATCH --job-name=her-nemo-reward
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
her_nemo_job reward "$@"
