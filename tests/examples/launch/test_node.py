"""examples/launch/node.sh with ranks that only play: what it hands on, whom it ends, and with which code."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.examples.launch import player
from tests.examples.launch.conftest import group, wait_for
from tests.runs import REPOSITORY

NODE = REPOSITORY / "examples" / "launch" / "node.sh"


def start(folder: Path, *play: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """The second of three nodes."""
    place = {"NODES": "3", "NODE_RANK": "1", "RANKS": str(len(play)), "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    return group([NODE, "RUN.toml"], env=os.environ | player.install(folder, list(play)) | place)


def test_ranks_know_their_places(tmp_path: Path) -> None:
    with start(tmp_path, "finish", "finish") as node:
        assert node.wait(timeout=60) == 0
    for local in (0, 1):
        assert (tmp_path / f"rank-{2 + local}").read_text() == f"{2 + local} {local} 6 2 node0 29500"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_reaches_every_rank_and_the_run_is_not_taken_for_finished(name: str, tmp_path: Path) -> None:
    with start(tmp_path, "wait", "wait", "wait") as node:
        wait_for(lambda: len(list(tmp_path.glob("rank-*"))) == 3)
        node.send_signal(signal.Signals[name])
        assert node.wait(timeout=60) == 75
    assert sorted(path.name for path in tmp_path.glob("SIG*")) == [f"{name}-{rank}" for rank in (3, 4, 5)]


@pytest.mark.parametrize(
    ("play", "code"), [(["2", "2"], 2), (["wait", "17"], 17), (["wait", "die", "wait"], 137), (["save+2"], 2)]
)
def test_the_first_failure_ends_the_others_and_is_told(play: list[str], code: int, tmp_path: Path) -> None:
    with start(tmp_path, *play) as node:
        assert node.wait(timeout=60) == code
    assert not list(tmp_path.glob("SIG*"))  # the lost rank's peers are killed: nothing of theirs can be saved


@pytest.mark.parametrize("play", [["save+17"], ["17", "save+die"]])
def test_a_run_that_dies_after_a_new_checkpoint_is_to_be_started_again(play: list[str], tmp_path: Path) -> None:
    with start(tmp_path, *play) as node:
        assert node.wait(timeout=60) == 75
    assert not (tmp_path / "finished").exists()


def test_a_signal_before_its_ranks_asks_for_another_start(tmp_path: Path) -> None:
    variables = player.install(tmp_path, ["finish"])
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\necho >>"{tmp_path}/asked"; sleep 2; echo "{{}}"\n')
    place = {"NODES": "1", "NODE_RANK": "0", "RANKS": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    with group([NODE, "RUN.toml"], env=os.environ | variables | place) as node:
        wait_for((tmp_path / "asked").exists)
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=60) == 75
    assert (tmp_path / "asked").read_text() == "\n"


def test_without_its_variables_it_says_which() -> None:
    finished = subprocess.run([str(NODE)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert finished.returncode != 0 and "NODES" in finished.stderr
