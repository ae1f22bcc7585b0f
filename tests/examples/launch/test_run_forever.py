"""examples/launch/run_forever.sh with launchers and ranks that only play: whom it signals, and whom it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.examples.launch.conftest import RUN, group, has_done, losses, wait_for
from tests.runs import REPOSITORY, Case, environment, free_port

SUPERVISOR, NODE = (REPOSITORY / "examples" / "launch" / name for name in ("run_forever.sh", "node.sh"))
# a rank takes a while until it listens; then it waits, for a minute, for the signal to leave. $1: OUTPUT
RANK = """
echo $$ >"$1/rank.$$"
sleep 1
trap 'echo 3 USR1 >"$1/stopped"; exit' USR1
touch "$1/listens"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@contextmanager
def supervise(output: Path, launcher: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher in bash, with OUTPUT and the rank's script as its arguments. Standard error goes to OUTPUT/said."""
    output.mkdir()
    (output / "rank.sh").write_text(RANK)
    variables = os.environ | {"RUN_FOREVER_TRIES": "2", "RUN_FOREVER_SECONDS": "0"}
    command = [SUPERVISOR, output, "bash", "-c", launcher, "launcher", output, output / "rank.sh"]
    with (output / "said").open("w") as said, group(command, env=variables, stderr=said) as run:
        yield run


def ranks(output: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in output.glob("rank.*") if path.suffix != ".sh" and path.read_text()]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Its ranks have sessions of their own, as under torchrun. Those of another supervisor are left alone."""
    start = 'for i in 0 1; do RANK=$i setsid bash "$2" "$1" & done; until [ -e "$1/listens" ]; do sleep 0.1; done; '
    # one that is dead and not yet waited for has no command line
    alone = 'for pid in $(cat "$1"/rank.[0-9]*); do grep -qs . /proc/$pid/cmdline && exit 9; done; touch "$1/finished"; exit'
    again = f'if [ -e "$1/listens" ]; then {alone}; fi; '
    with (
        supervise(tmp_path / "other", f"{start} wait") as other,
        supervise(tmp_path / "own", f"{again}{start} kill -KILL $$") as own,
    ):
        assert own.wait(timeout=60) == 0, (tmp_path / "own" / "said").read_text()
        assert len(ranks(tmp_path / "own")) == 2 and not any(map(lives, ranks(tmp_path / "own")))
        wait_for((tmp_path / "other" / "listens").exists)
        assert len(ranks(tmp_path / "other")) == 2 and all(map(lives, ranks(tmp_path / "other")))
        other.send_signal(signal.SIGUSR1)
        assert other.wait(timeout=60) == 0


def test_a_signal_waits_until_ranks_listen_and_spares_their_launcher(tmp_path: Path) -> None:
    """Neither of them would live if it came as soon as they are there."""
    with supervise(tmp_path / "out", 'RANK=0 setsid bash "$2" "$1" & wait; [ -e "$1/stopped" ]') as run:
        wait_for(lambda: bool(ranks(tmp_path / "out")))
        assert not (tmp_path / "out" / "listens").exists()
        run.send_signal(signal.SIGUSR1)
        assert run.wait(timeout=60) == 0, (tmp_path / "out" / "said").read_text()
    assert (tmp_path / "out" / "stopped").read_text() == "3 USR1\n"


def test_where_all_ranks_run_elsewhere_it_says_how_to_reach_one_and_waits(tmp_path: Path) -> None:
    """The rank is not below the script, as if sshd had started it."""
    output = tmp_path / "out"
    with supervise(output, 'touch "$1/started"; until [ -e "$1/stopped" ]; do sleep 0.1; done') as run:
        command = ["bash", output / "rank.sh", output, "-m", "megatron_vocagno.pretrain", "--local_rank=0", "RUN.toml"]
        with group(command, env=os.environ | {"RANK": "0"}) as elsewhere:
            wait_for(lambda: (output / "started").exists() and (output / "listens").exists())
            run.send_signal(signal.SIGUSR1)
            wait_for(lambda: "pkill" in (output / "said").read_text())
            assert run.poll() is None and elsewhere.poll() is None
            pattern = (output / "said").read_text().split("-f '")[1].split("'")[0]
            found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()
            assert str(elsewhere.pid) in found
            elsewhere.send_signal(signal.SIGUSR1)
            assert run.wait(timeout=60) == 0


def test_the_exit_code_of_node_sh_for_a_stopped_run_ends_it(tmp_path: Path) -> None:
    with supervise(tmp_path / "out", 'echo >>"$1/starts"; touch "$1/stopped"; exit 75') as run:
        assert run.wait(timeout=60) == 0
    with supervise(tmp_path / "died", 'echo >>"$1/starts"; exit 75') as run:
        assert run.wait(timeout=60) == 1
    assert [(tmp_path / name / "starts").read_text().count("\n") for name in ("out", "died")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [["missing.toml"], ["missing.toml", "--unknown"]], ids=["run file", "option"])
def test_a_mistake_ends_it_under_torchrun_too(mistake: list[str], tmp_path: Path) -> None:
    """torchrun ends with 1, whatever its ranks do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["examples/pretrain_vocagno.py", *mistake, "--deepspeed_config=ds_configs/cpu.json"]
    variables = environment(RUN_FOREVER_TRIES="2", RUN_FOREVER_SECONDS="0", TMPDIR=str(tmp_path))
    ended = subprocess.run(
        [SUPERVISOR, tmp_path / "out", *command], cwd=REPOSITORY, env=variables, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert "error: " in ended.stderr and "run_forever: " not in ended.stderr
    assert not any(tmp_path.glob("tmp.*"))


@pytest.mark.long
@pytest.mark.slow
def test_a_script_on_each_machine_bears_a_lost_rank_and_a_signal(case: Case, one_host: dict[int, float]) -> None:
    """A training run of two machines with a rank each: a rank is killed, all come again; a signal to one script stops all."""
    output = case.out("two_scripts")
    command = [SUPERVISOR, output, NODE, *case.command("two_scripts", [*RUN, "checkpoint.every=1"])]
    place = {"NODES": "2", "RANKS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (environment(**place, NODE_RANK=str(rank), RUN_FOREVER_SECONDS="0") for rank in range(2))
    with group(command, cwd=REPOSITORY, env=first) as a, group(command, cwd=REPOSITORY, env=second) as b:
        wait_for(lambda: has_done(output, 1))
        (killed,) = (process for process in psutil.Process(b.pid).children(recursive=True) if "RANK" in process.environ())
        killed.kill()
        wait_for(lambda: has_done(output, 3))
        b.send_signal(signal.SIGUSR1)
        assert [a.wait(timeout=300), b.wait(timeout=300)] == [0, 0]
    done = losses(output)
    assert (output / "stopped").read_text() == f"{len(done)} SIGUSR1\n"
    assert 3 <= len(done) < len(one_host) and done == {step: one_host[step] for step in done}
