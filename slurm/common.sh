#!/usr/bin/env bash
# What the job scripts share; sourced, not run. `her_nemo_job STAGE [overrides]` is all they call.
#
# Where the software is, one of:
#   HER_NEMO_VENV=DIR        a virtual environment on a shared file system (default: .venv of this checkout)
#   HER_NEMO_CONTAINER=IMAGE a container through pyxis (srun --container-image); HER_NEMO_MOUNTS=SRC:DST,... as pyxis
#                            wants them. The checkout itself is always mounted.
# HER_NEMO_MAX_RESTARTS=N    how often a job that ran into its time limit goes back to the queue (default 100).
# Logs: logs/<job>/ under the directory that sbatch was called from.

HER_NEMO_REPO="${HER_NEMO_REPO:-${SLURM_SUBMIT_DIR:?run this through sbatch}}"
HER_NEMO_LOGS="${SLURM_SUBMIT_DIR}/logs/${SLURM_JOB_ID:?run this through sbatch}"
HER_NEMO_START="${SLURM_RESTART_COUNT:-0}"
HER_NEMO_TOLD_TO_STOP=0
HER_NEMO_GRACE=60 # seconds that processes have to end when their partners have failed, before they are killed

# Slurm's warning before the time limit (--signal=B:TERM@300) comes to this shell alone, as early as Slurm likes: up to a
# minute before it was asked for. So the trap is the first thing here; her_nemo_wait passes the warning on.
her_nemo_stop() {
    HER_NEMO_TOLD_TO_STOP=1
    echo "her-nemo: told to stop; the ranks save and end, then the job goes back to the queue"
}
trap her_nemo_stop TERM

# shellcheck source=slurm/servers.sh
source "${HER_NEMO_REPO}/slurm/servers.sh"

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
    # Since Slurm 22.05 srun does not take --cpus-per-task from sbatch: without this a rank would get one core.
    [[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK}"
    # All ranks meet at the first node. The port follows from the job, so that two jobs on a node do not collide.
    mapfile -t HER_NEMO_NODES < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
    MASTER_ADDR="${MASTER_ADDR:-$(her_nemo_address "${HER_NEMO_NODES[0]:?scontrol named no node}")}"
    export MASTER_ADDR
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
}

# The address by which Slurm itself reaches a node; its name where Slurm has no other.
her_nemo_address() {
    local address
    address="$(scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
    echo "${address:-$1}"
}

# srun's options for container or plain environment, in HER_NEMO_SRUN; the interpreter, in HER_NEMO_PYTHON.
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

# her_nemo_signal STEP-NAME SIGNAL: to every task of a step of this job; fails if there is no such step (yet, or any more).
her_nemo_signal() {
    local step name found=1
    while read -r step name; do
        if [[ "${name}" == "$1" ]] && scancel --signal="$2" "${step}"; then
            found=0
        fi
    done < <(squeue --steps --noheader --jobs="${SLURM_JOB_ID}" --format='%i %j')
    return "${found}"
}

# Ends a step: TERM, and KILL if its srun (process $2) is still there after HER_NEMO_GRACE seconds.
her_nemo_end() {
    local waited
    her_nemo_signal "$1" TERM || true
    for ((waited = 0; waited < HER_NEMO_GRACE; waited++)); do
        kill -0 "$2" 2>/dev/null || return 0
        sleep 1
    done
    her_nemo_signal "$1" KILL || true
}

# Waits for the ranks (process $1); their exit code. It looks once a second, since `wait` would end at the first signal
# and can look after one thing only. Told to stop, it tells the ranks, which save after the step they are in; servers are
# not told, for a rollout under way needs them. If the servers (process $2, if any) end first, the ranks are ended.
her_nemo_wait() {
    local code=0 told=0
    while kill -0 "$1" 2>/dev/null; do
        if ((HER_NEMO_TOLD_TO_STOP && told == 0)) && her_nemo_signal her-nemo-ranks TERM; then
            told=1
        fi
        if [[ -n "${2:-}" ]] && ! kill -0 "$2" 2>/dev/null; then
            echo "her-nemo: a server has ended; its last words are in ${HER_NEMO_LOGS}/vllm_*_${HER_NEMO_START}.txt"
            her_nemo_end her-nemo-ranks "$1"
            wait "$1" || true
            return 4
        fi
        sleep 1
    done
    wait "$1" && code=0 || code=$?
    return "${code}"
}

# Back to the queue: the same job, the same overrides, the same run directory, so that it goes on from the checkpoint.
# But only one that runs: scancel sends this shell the same signal, and a job that was cancelled is COMPLETING by now.
her_nemo_requeue() {
    if [[ "$(scontrol show job --oneliner "${SLURM_JOB_ID}")" != *" JobState=RUNNING "* ]]; then
        echo "her-nemo: cancelled or over, so not requeued"
        return 0
    fi
    if ((HER_NEMO_START >= ${HER_NEMO_MAX_RESTARTS:-100})); then
        echo "her-nemo: stopped, and not requeued: this was restart ${HER_NEMO_START} (HER_NEMO_MAX_RESTARTS)"
        return 3
    fi
    scontrol requeue "${SLURM_JOB_ID}"
}

# her_nemo_preflight STAGE [overrides]: one task on one node says in seconds what would otherwise end every rank after
# minutes.
her_nemo_preflight() {
    local code=0
    echo "her-nemo: preflight"
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${HER_NEMO_SRUN[@]}" "${HER_NEMO_PYTHON}" -m her_nemo plan "$@" \
        --strict >"${HER_NEMO_LOGS}/plan.txt" 2>&1 || code=$?
    cat "${HER_NEMO_LOGS}/plan.txt"
    her_nemo_check_servers || code=2
    if ((code != 0 && HER_NEMO_TOLD_TO_STOP == 0)); then
        echo "her-nemo: preflight failed; nothing was started"
        return 2
    fi
}

# her_nemo_job STAGE [overrides]: preflight, servers if there are any, the stage on every other task; requeue if it was
# told to stop.
her_nemo_job() {
    local stage="$1" code=0 servers="" trainers per_node="${SLURM_NTASKS_PER_NODE:-${SLURM_NTASKS:-1}}"
    shift
    mkdir -p "${HER_NEMO_LOGS}"
    her_nemo_environment
    her_nemo_software
    trainers=$((${#HER_NEMO_NODES[@]} - VLLM_NODES))
    local -a size=()
    if [[ "${stage}" != evaluate ]]; then
        size=("trainer.num_nodes=${trainers}" "trainer.devices=${per_node}")
    fi
    her_nemo_name_servers
    if [[ "${stage}" == ppo ]]; then
        size+=("${HER_NEMO_SERVED[@]}")
    fi
    echo "her-nemo: job ${SLURM_JOB_ID}, ${stage}, start $((HER_NEMO_START + 1)), logs in ${HER_NEMO_LOGS}"
    her_nemo_preflight "${stage}" "${size[@]}" "$@" || return $?

    if ((VLLM_NODES > 0 && HER_NEMO_TOLD_TO_STOP == 0)); then
        her_nemo_start_servers
        servers="${HER_NEMO_SERVERS}"
        her_nemo_await_servers || code=$?
    fi
    if ((code == 0 && HER_NEMO_TOLD_TO_STOP == 0)); then
        srun --job-name=her-nemo-ranks --nodes="${trainers}" --ntasks="$((trainers * per_node))" \
            --nodelist="$(her_nemo_join "${HER_NEMO_NODES[@]:0:trainers}")" --kill-on-bad-exit=1 --label \
            --output="${HER_NEMO_LOGS}/ranks_${HER_NEMO_START}.txt" "${HER_NEMO_SRUN[@]}" \
            bash -c "${HER_NEMO_RANK}" her-nemo "${HER_NEMO_PYTHON}" -m her_nemo "${stage}" "${size[@]}" "$@" &
        her_nemo_wait $! "${servers}" || code=$?
    fi
    if [[ -n "${servers}" ]]; then
        her_nemo_end her-nemo-servers "${servers}"
        wait "${servers}" || true
    fi
    trap - TERM
    # A rank that was told to stop while it still imported ends by the signal: nothing is lost that had been saved.
    if ((HER_NEMO_TOLD_TO_STOP)) && [[ "${code}" =~ ^(0|15|130|143)$ ]]; then
        her_nemo_requeue
        return $?
    fi
    if ((code != 0)); then
        [[ -e "${HER_NEMO_LOGS}/ranks_${HER_NEMO_START}.txt" ]] && tail -n 40 "${HER_NEMO_LOGS}/ranks_${HER_NEMO_START}.txt"
        echo "her-nemo: ${stage} failed with exit code ${code}"
        return "${code}"
    fi
    echo "her-nemo: ${stage} is done"
}

her_nemo_join() {
    local IFS=,
    echo "$*"
}
