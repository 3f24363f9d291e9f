#!/usr/bin/env bash
# Replies from vLLM on held-out prompts, scored: one task, which takes tensor_parallel_size GPUs of its node.
#   sbatch slurm/eval.sh [overrides]
# e.g. sbatch --gpus-per-node=4 slurm/eval.sh model=DIR prompts=FILE out=DIR tensor_parallel_size=4
#SBATCH --job-name=her-nemo-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
set -euo pipefail
# shellcheck source=slurm/common.sh
source "${HER_NEMO_REPO:-${SLURM_SUBMIT_DIR:?run this through sbatch}}/slurm/common.sh"
her_nemo_job evaluate "$@"
