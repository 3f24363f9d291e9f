#!/usr/bin/env bash
# A Slurm of its own on this machine, to try job scripts with: slurmctld, munged, and a slurmd for every node.
#   tools/local_slurm.sh start DIR [NODES]   then: export SLURM_CONF=DIR/slurm.conf, and sbatch, squeue ... work
#   tools/local_slurm.sh stop DIR
# Debian: apt-get install slurmctld slurmd slurm-client munge. No root is needed: every daemon runs as the caller, and all
# it writes lies in DIR. CPUs and GPUs of the nodes are invented (jobs get no GPU), so scripts run as they are.
set -euo pipefail

NODES=2
FIRST_PORT="${LOCAL_SLURM_PORT:-17000}"   # slurmctld's; the nodes have the next ones
START_SECONDS=60
export PATH="${PATH}:/usr/sbin:/sbin"

fail() {
    echo "local_slurm: $*" >&2
    exit 1
}

write_configuration() {
    local user host index
    user="$(id -un)"
    host="$(hostname -s)"
    mkdir -p "${DIR}"/{state,logs,spool}
    cat >"${DIR}/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=${host}(127.0.0.1)
SlurmUser=${user}
SlurmdUser=${user}
SlurmctldPort=${FIRST_PORT}
AuthType=auth/munge
# cred_expire is also how long a requeued job has to wait, two minutes by default; a busy machine launches slowly.
AuthInfo=socket=${DIR}/munge.socket,cred_expire=20
StateSaveLocation=${DIR}/state
SlurmdSpoolDir=${DIR}/spool/%n
SlurmctldPidFile=${DIR}/slurmctld.pid
SlurmdPidFile=${DIR}/slurmd_%n.pid
SlurmctldLogFile=${DIR}/logs/slurmctld.txt
SlurmdLogFile=${DIR}/logs/slurmd_%n.txt
# Neither cgroups nor binding: they need root and a real node.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=10
# A machine that is busy with the jobs themselves answers late.
MessageTimeout=60
BatchStartTimeout=60
SchedulerParameters=batch_sched_delay=0,sched_interval=5
MailProg=/bin/true
FirstJobId=$((1 + $$ % 20000))
CONF
    touch "${DIR}"/gpu{0..7}   # what stands for a device; nothing opens it
    printf 'Name=gpu File=%s/gpu[0-7]\n' "${DIR}" >"${DIR}/gres.conf"
    for ((index = 1; index <= NODES; index++)); do
        printf 'NodeName=n%d NodeHostname=%s NodeAddr=127.0.0.%d Port=%d CPUs=64 RealMemory=1000 Gres=gpu:8\n' \
            "${index}" "${host}" "${index}" "$((FIRST_PORT + index))" >>"${DIR}/slurm.conf"
    done
    printf 'PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n' >>"${DIR}/slurm.conf"
}

start() {
    local program index
    for program in munged slurmctld slurmd sinfo; do
        command -v "${program}" >/dev/null || fail "${program} is not installed"
    done
    [[ ! -e "${DIR}/slurm.conf" ]] || fail "${DIR}: holds a cluster already; stop it, or give another directory"
    write_configuration
    export SLURM_CONF="${DIR}/slurm.conf"
    trap 'stop' ERR
    (umask 077 && head -c 1024 /dev/urandom >"${DIR}/munge.key")
    # --force: /tmp above DIR may be written to by others, which munged does not like.
    munged --force --key-file="${DIR}/munge.key" --socket="${DIR}/munge.socket" --pid-file="${DIR}/munged.pid" \
        --log-file="${DIR}/logs/munged.txt" --seed-file="${DIR}/munge.seed" 2>>"${DIR}/logs/munged.txt"
    slurmctld -c
    for ((index = 1; index <= NODES; index++)); do
        slurmd -N "n${index}"
    done
    for ((index = 0; index < START_SECONDS * 2; index++)); do
        if [[ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l)" == "${NODES}" ]]; then
            trap - ERR
            echo "export SLURM_CONF=${SLURM_CONF}"
            return
        fi
        sleep 0.5
    done
    tail -n 20 "${DIR}"/logs/slurm*.txt >&2
    stop
    fail "the nodes were not idle after ${START_SECONDS} seconds"
}

# Every job first, or its processes would outlive slurmd; then the daemons, by their pid files.
stop() {
    local file pid round
    export SLURM_CONF="${DIR}/slurm.conf"
    if [[ -e "${DIR}/slurmctld.pid" ]]; then
        timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
        for ((round = 0; round < 40; round++)); do
            [[ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ]] || break
            sleep 0.5
        done
    fi
    for file in "${DIR}"/slurmd_*.pid "${DIR}/slurmctld.pid" "${DIR}/munged.pid"; do
        [[ -e "${file}" ]] || continue
        pid="$(cat "${file}")"
        kill "${pid}" 2>/dev/null || true
        for ((round = 0; round < 40; round++)); do
            kill -0 "${pid}" 2>/dev/null || break
            sleep 0.25
        done
        kill -9 "${pid}" 2>/dev/null || true
    done
    rm -rf "${DIR}"/{state,spool,slurm.conf,gres.conf,gpu?,munge.*,*.pid}
}

[[ $# -ge 2 ]] || fail "usage: local_slurm.sh start|stop DIR [NODES]"
mkdir -p "$2"
DIR="$(cd "$2" && pwd)"
NODES="${3:-${NODES}}"
case "$1" in
    start) start ;;
    stop) stop ;;
    *) fail "no such verb: $1" ;;
esac
