#!/usr/bin/env bash
# Installs what tests/cluster needs, from the packages of Debian or Ubuntu. Starts no service. Where
# the tests cannot run, it says why and ends with 1.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

PACKAGES=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 hostname)
PROGRAMS=(slurmctld slurmd srun sbatch munged sshd ssh pdsh ip hostname nsenter unshare)

fail() {
    echo "the cluster tests cannot run here: $*" >&2
    exit 1
}

lacking() {
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

((EUID == 0)) || fail "they need root, for hosts with a network of their own and a SLURM controller"
unshare --net --uts --mount --ipc --pid --fork --mount-proc true 2>/dev/null ||
    fail "the kernel refuses namespaces (a container needs --privileged)"

if [[ -n $(lacking) ]]; then
    command -v apt-get >/dev/null ||
        fail "there is no apt-get to install" $(lacking) "with"
    log=$(mktemp)
    remove=("$log")
    trap 'rm -f "${remove[@]}"' EXIT
    # Packages would start their services: forbidden while they are installed.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        remove+=("$policy")
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install --yes --no-install-recommends "${PACKAGES[@]}"; } \
        >"$log" 2>&1 || fail "apt-get: $(tail -n 1 "$log")"
    [[ -z $(lacking) ]] || fail "still missing after apt-get:" $(lacking)
fi

unshare --net ip link add name host1 type veth peer name host2 2>/dev/null ||
    fail "the kernel has no virtual network cables (module veth)"
