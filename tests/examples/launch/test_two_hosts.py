"""A pipeline over two hosts: network namespaces of this machine, joined by a cable of two virtual interfaces."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.examples.launch.conftest import RUN, STEPS, losses
from tests.runs import REPOSITORY, STUDENT, Case, environment

# A namespace for both hosts, and everything in it ends with its first process. Each host has an address, and no other way out.
HOSTS = """
set -euo pipefail
host() {
    local n=$1
    shift
    nsenter --net=/proc/${host[n]}/ns/net "$@"
}
for n in 0 1; do
    unshare --net sleep infinity &
    host[n]=$!
done
until [[ $(readlink /proc/${host[0]}/ns/net) != $(readlink /proc/$$/ns/net) ]]; do sleep 0.05; done
until [[ $(readlink /proc/${host[1]}/ns/net) != $(readlink /proc/$$/ns/net) ]]; do sleep 0.05; done
ip link add cable0 netns ${host[0]} type veth peer name cable1 netns ${host[1]}
for n in 0 1; do
    host $n ip link set lo up
    host $n ip address add 10.77.0.$((n + 1))/24 dev cable$n
    host $n ip link set cable$n up
done
for n in 0 1; do
    GLOO_SOCKET_IFNAME=cable$n NODES=2 NODE_RANK=$n RANKS=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 \\
        host $n "$@" &
    node[n]=$!
done
wait ${node[0]}
wait ${node[1]}
host 0 ip -statistics -json link show cable0
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture(scope="module")
def namespaces() -> list[str]:
    """The command before others that gives them a network of their own."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"no network namespaces here: the command {tool} is not installed")
    trial = [*UNSHARE, "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    return UNSHARE


@pytest.mark.long
@pytest.mark.slow
def test_a_pipeline_over_two_hosts_has_the_losses_of_one(namespaces: list[str], case: Case, one_host: dict[int, float]) -> None:
    node = str(REPOSITORY / "examples" / "launch" / "node.sh")
    command = [*namespaces, "bash", "-c", HOSTS, "hosts", node, *case.command("two_hosts", RUN)]
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert losses(case.out("two_hosts")) == one_host
    # what the first stage sent over the cable: at least the hidden states of every step, in float32
    (cable,) = json.loads(finished.stdout.splitlines()[-1])
    rows, row_length = 8, 64
    assert cable["stats64"]["tx"]["bytes"] > STEPS * rows * row_length * int(STUDENT["hidden_size"]) * 4
