"""DeepSpeed's own launcher over a hostfile, as docs/clusters.md has it; two machines are two folders of this one.

What stands in is the way to the other machine alone: `pdsh` runs here what it is given for each host, and `ssh` answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.launch.conftest import RUN, documented, group, losses
from tests.runs import REPOSITORY, Case, environment, free_port

LAUNCH = REPOSITORY / "examples" / "launch"
PDSH = """
import os, subprocess, sys
assert sys.argv[1:4] == ["-S", "-f", "1024"] and sys.argv[4] == "-w", sys.argv
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
# a login of its own: nothing of the caller's environment but the path to Python
fresh = {name: os.environ[name] for name in ("PATH", "HOME", "DS_ACCELERATOR")}
started = [
    subprocess.Popen(["bash", "-c", command.replace("%n", str(i)).replace("%h", host)], env=fresh) for i, host in enumerate(hosts)
]
open(os.environ["PDSH_RECORD"], "w").write(command)
sys.exit(max(node.wait() for node in started))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "pdsh.py").write_text(PDSH)
    for name, script in {"pdsh": f'exec "{sys.executable}" "{tmp_path}/pdsh.py" "$@"', "ssh": "exit 0"}.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    variables = environment(PDSH_RECORD=str(tmp_path / "command"))
    return variables | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"}


def test_the_hostfile_is_read_by_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {"node1": 8, "node2": 8}


@pytest.mark.long
@pytest.mark.slow
def test_two_machines_by_pdsh_train_as_one(
    case: Case, one_host: dict[int, float], cluster: dict[str, str], tmp_path: Path
) -> None:
    """The variables of .deepspeed_env reach the ranks of both."""
    work = tmp_path / "work"
    work.mkdir()
    run, _, settings, *overrides = case.command("pdsh", RUN)
    words = {
        "cp examples/launch/hostfile examples/launch/deepspeed_env": f"cp {LAUNCH / 'hostfile'} {LAUNCH / 'deepspeed_env'}",
        "--master_addr node1": f"--master_addr 127.0.0.1 --master_port {free_port()}",
        "RUN.toml": run,
        "ds_configs/gpu_zero1_bf16.json": " ".join([settings, *overrides]),
    }
    commands, *_ = documented("DeepSpeed's launcher", words)
    edits = "sed -i s/slots=8/slots=1/ hostfile; sed -i 's/=eth0/=lo/; s/OMP_NUM_THREADS=8/OMP_NUM_THREADS=1/' .deepspeed_env\n"
    copy, launch = commands.splitlines(keepends=True)[:-1], commands.splitlines()[-1]
    script = "".join(copy) + edits + launch
    variables = cluster | {"HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    with group(["bash", "-euc", script], cwd=work, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as user:
        output, _ = user.communicate(timeout=300)
    assert user.returncode == 0, output
    command = (tmp_path / "command").read_text()
    assert "--node_rank=%n" in command and "export NCCL_SOCKET_IFNAME=lo;" in command
    assert losses(case.out("pdsh")) == one_host
