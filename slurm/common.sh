#!/usr/bin/env bash
# What the job scripts share; sourced, not run. `her_nemo_job STAGE [overrides]` is all they call.
#
# Where the software is, one of:
#   HER_NEMO_VENV=DIR        a virtual environment on a shared file system (default: .venv of this checkout)
#   HER_NEMO_CONTAINER=IMAGE a container through pyxis (srun --container-image); HER_NEMO_MOUNTS=SRC:DST,... as pyxis
#                            wants them. The checkout itself is always mounted.
# Logs: logs/<job>/ under the directory that sbatch was called from.

HER_NEMO_REPO="${HER_NEMO_REPO:-${SLURM_SUBMIT_DIR:?run this through sbatch}}"
HER_NEMO_LOGS="${SLURM_SUBMIT_DIR}/logs/${SLURM_JOB_ID:?run this through sbatch}"
HER_NEMO_TOLD_TO_STOP=0

# The environment of every process. What the user has set stays.
her_nemo_environment() {
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"                # nodes of a cluster rarely reach the hub, and must not wait
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"              # eight processes share the cores
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"   # megatron-core: order of TP and compute kernels
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"   # less fragmentation
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"   # a dead rank ends the others
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    export PYTHONUNBUFFERED=1
    # All ranks meet at the first node. The port follows from the job, so that two jobs on a node do not collide.
    local -a nodes
    mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")
    export MASTER_ADDR="${nodes[0]:?scontrol named no node}"
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
}

# srun's options for container or plain environment, in HER_NEMO_SRUN; the command itself, in HER_NEMO_COMMAND.
her_nemo_software() {
    HER_NEMO_SRUN=()
    if [[ -n "${HER_NEMO_CONTAINER:-}" ]]; then
        local mounts="${HER_NEMO_REPO}:${HER_NEMO_REPO},${SLURM_SUBMIT_DIR}:${SLURM_SUBMIT_DIR}"
        [[ -n "${HER_NEMO_MOUNTS:-}" ]] && mounts="${mounts},${HER_NEMO_MOUNTS}"
        HER_NEMO_SRUN=(--container-image="${HER_NEMO_CONTAINER}" --container-mounts="${mounts}"
            --container-workdir="${SLURM_SUBMIT_DIR}")
        HER_NEMO_PYTHON=python
    else
        HER_NEMO_PYTHON="${HER_NEMO_VENV:-${HER_NEMO_REPO}/.venv}/bin/python"
    fi
    export PYTHONPATH="${HER_NEMO_REPO}${PYTHONPATH:+:${PYTHONPATH}}"
}

# One rank: Slurm's names for its place, given the names torch.distributed knows.
# shellcheck disable=SC2016  # expanded by the rank's own shell, not here
HER_NEMO_RANK='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
exec "$@"'

# Slurm's warning before the time limit (--signal=B:TERM@300) comes to this shell alone: pass it to the ranks, which
# save after the step they are in. scancel --signal reaches the job's steps and not this script.
her_nemo_stop() {
    HER_NEMO_TOLD_TO_STOP=1
    echo "her-nemo: told to stop; the ranks save and end, then the job goes back to the queue"
    scancel --signal=TERM "${SLURM_JOB_ID}"
}

# Wait for a background process through the signals that interrupt `wait`; its exit code.
her_nemo_wait() {
    local code=0
    while true; do
        wait "$1" && code=0 || code=$?
        kill -0 "$1" 2>/dev/null || break
    done
    return "${code}"
}

# her_nemo_job STAGE [overrides]: preflight, then the stage on every task; requeue if it was told to stop.
her_nemo_job() {
    local stage="$1" code=0
    shift
    mkdir -p "${HER_NEMO_LOGS}"
    her_nemo_environment
    her_nemo_software
    local -a size=()
    if [[ "${stage}" != evaluate ]]; then
        size=("trainer.num_nodes=${SLURM_JOB_NUM_NODES:-1}" "trainer.devices=${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}}")
    fi
    echo "her-nemo: job ${SLURM_JOB_ID}, ${stage}, start $((${SLURM_RESTART_COUNT:-0} + 1)), logs in ${HER_NEMO_LOGS}"

    # One task on one node says in seconds what would otherwise end every rank after minutes.
    echo "her-nemo: preflight"
    if ! srun --nodes=1 --ntasks=1 "${HER_NEMO_SRUN[@]}" "${HER_NEMO_PYTHON}" -m her_nemo plan "${stage}" \
        "${size[@]}" "$@" --strict >"${HER_NEMO_LOGS}/plan.txt" 2>&1; then
        cat "${HER_NEMO_LOGS}/plan.txt"
        echo "her-nemo: preflight failed; nothing was started"
        return 2
    fi
    cat "${HER_NEMO_LOGS}/plan.txt"

    trap her_nemo_stop TERM
    srun --kill-on-bad-exit=1 --label --output="${HER_NEMO_LOGS}/ranks_${SLURM_RESTART_COUNT:-0}.txt" \
        "${HER_NEMO_SRUN[@]}" bash -c "${HER_NEMO_RANK}" her-nemo \
        "${HER_NEMO_PYTHON}" -m her_nemo "${stage}" "${size[@]}" "$@" &
    her_nemo_wait $! || code=$?
    trap - TERM
    if ((code != 0)); then
        tail -n 40 "${HER_NEMO_LOGS}/ranks_${SLURM_RESTART_COUNT:-0}.txt"
        echo "her-nemo: ${stage} failed with exit code ${code}"
        return "${code}"
    fi
    if ((HER_NEMO_TOLD_TO_STOP)); then
        # The same job, the same overrides, the same run directory: it goes on from the checkpoint.
        scontrol requeue "${SLURM_JOB_ID}"
        return 0
    fi
    echo "her-nemo: ${stage} is done"
}
