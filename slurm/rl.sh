#!/usr/bin/env bash
# PPO. By default every task is a trainer: the actor generates its own rollouts (rollout/megatron_engine.py).
#   sbatch --nodes=4 slurm/rl.sh [overrides]
# With VLLM_NODES=N VLLM_MODEL=DIR the last N nodes generate with vLLM, and the others train (slurm/servers.sh).
# e.g. sbatch --nodes=4 slurm/rl.sh pretrained_checkpoint.restore_from_path=runs/sft reward.restore_from_path=runs/reward ...
#SBATCH --job-name=her-nemo-rl
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
her_nemo_job ppo "$@"
