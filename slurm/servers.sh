#!/usr/bin/env bash
# vLLM servers beside the ranks of the same job; sourced by common.sh, which starts them if VLLM_NODES > 0. The actor of
# slurm/rl.sh generates with them: it sends them its weights (model.ppo.rollout_engine=vllm, docs/rollouts.md).
#
#   VLLM_NODES=N      the last N nodes of the job serve, one server each; the others train (default 0: all train)
#   VLLM_MODEL=DIR    a directory with the policy's config.json; weights come from the trainer
#   VLLM_TP=N         tensor parallel size of a server (default: the GPUs of its node)
#   VLLM_PORT=8000    VLLM_ARGS="..." further arguments of `python -m her_nemo.rollout.vllm_server` or of vLLM,
#                     e.g. "--max-model-len 8192"
#   VLLM_DEADLINE=900 seconds until all of them have to answer /health

VLLM_NODES="${VLLM_NODES:-0}"
if ! [[ "${VLLM_NODES}" =~ ^[0-9]+$ ]]; then
    echo "her-nemo: VLLM_NODES=${VLLM_NODES} is no whole number"
    exit 2
fi
VLLM_PORT="${VLLM_PORT:-8000}"
VLLM_DEADLINE="${VLLM_DEADLINE:-900}"
# What common.sh sets for megatron-core: one connection slows vLLM down, its memory pools do not go with expandable
# segments, and the ranks' meeting place is not the server's.
HER_NEMO_NOT_FOR_VLLM=(-u CUDA_DEVICE_MAX_CONNECTIONS -u PYTORCH_CUDA_ALLOC_CONF -u MASTER_ADDR -u MASTER_PORT)

# Everything that is wrong with the variables above, at once. Part of the preflight.
her_nemo_check_servers() {
    local code=0
    if ((VLLM_NODES >= ${#HER_NEMO_NODES[@]})); then
        echo "her-nemo: VLLM_NODES=${VLLM_NODES}, but the job has ${#HER_NEMO_NODES[@]} node(s) and one has to train:" \
            "use sbatch --nodes=N with a larger N"
        code=2
    elif ((VLLM_NODES > 0)) && [[ ! -f "${VLLM_MODEL:-}/config.json" ]]; then
        echo "her-nemo: VLLM_MODEL='${VLLM_MODEL:-}' is no Hugging Face directory (no config.json): give the policy's," \
            "e.g. what it was converted from"
        code=2
    fi
    return "${code}"
}

# Addresses of the servers to be, in HER_NEMO_VLLM_URLS, and what the stage has to know of them, in HER_NEMO_SERVED.
her_nemo_name_servers() {
    local node
    local -a urls=()
    HER_NEMO_SERVED=()
    ((VLLM_NODES > 0 && VLLM_NODES < ${#HER_NEMO_NODES[@]})) || return 0
    for node in "${HER_NEMO_NODES[@]: -VLLM_NODES}"; do
        urls+=("http://$(her_nemo_address "${node}"):${VLLM_PORT}")
    done
    HER_NEMO_VLLM_URLS="$(her_nemo_join "${urls[@]}")"
    # shellcheck disable=SC2034  # common.sh reads it
    HER_NEMO_SERVED=(model.ppo.rollout_engine=vllm "model.ppo.vllm.servers=['${HER_NEMO_VLLM_URLS//,/\',\'}']")
}

# One step with a task a node; its srun is process HER_NEMO_SERVERS.
her_nemo_start_servers() {
    local -a nodes=("${HER_NEMO_NODES[@]: -VLLM_NODES}") arguments=()
    read -ra arguments <<<"${VLLM_ARGS:-}"
    echo "her-nemo: vLLM serves ${VLLM_MODEL} at ${HER_NEMO_VLLM_URLS}"
    # A server may have all the cores of its node: a rank's share is not its measure.
    env -u SLURM_CPUS_PER_TASK -u SRUN_CPUS_PER_TASK srun --job-name=her-nemo-servers --nodes="${VLLM_NODES}" --ntasks="${VLLM_NODES}" --ntasks-per-node=1 \
        --nodelist="$(her_nemo_join "${nodes[@]}")" \
        --cpus-per-task="$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))" --kill-on-bad-exit=1 \
        --output="${HER_NEMO_LOGS}/vllm_%n_${HER_NEMO_START}.txt" "${HER_NEMO_SRUN[@]}" \
        env "${HER_NEMO_NOT_FOR_VLLM[@]}" "${HER_NEMO_PYTHON}" -m her_nemo.rollout.vllm_server "${VLLM_MODEL}" \
        --port "${VLLM_PORT}" --tensor-parallel-size "${VLLM_TP:-${SLURM_GPUS_ON_NODE:-1}}" "${arguments[@]}" &
    HER_NEMO_SERVERS=$!
}

# Until every server answers, one of them ends, the deadline passes or the job is told to stop.
her_nemo_await_servers() {
    local url begun="${SECONDS}"
    for url in ${HER_NEMO_VLLM_URLS//,/ }; do
        until her_nemo_healthy "${url}"; do
            ((HER_NEMO_TOLD_TO_STOP == 0)) || return 0
            if ! kill -0 "${HER_NEMO_SERVERS}" 2>/dev/null; then
                echo "her-nemo: a server has ended before it was ready:"
                tail -n 20 "${HER_NEMO_LOGS}"/vllm_*_"${HER_NEMO_START}".txt
                return 4
            fi
            if ((SECONDS - begun >= VLLM_DEADLINE)); then
                echo "her-nemo: ${url}/health did not answer within ${VLLM_DEADLINE} s (VLLM_DEADLINE):"
                tail -n 20 "${HER_NEMO_LOGS}"/vllm_*_"${HER_NEMO_START}".txt
                return 4
            fi
            sleep 1
        done
    done
    echo "her-nemo: the servers are ready after $((SECONDS - begun)) s"
}

# GET /health in plain bash: curl is not on every compute node.
her_nemo_healthy() {
    local place="${1#http://}"
    # shellcheck disable=SC2016  # expanded by the inner shell
    timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && read -r line <&3 &&
        [[ "$line" == *" 200 "* ]]' health "${place%:*}" "${place##*:}" 2>/dev/null
}
