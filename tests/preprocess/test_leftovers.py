"""What killed processes left is removed; what a neighbor is writing, and what is nobody's of ours, is not."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vocagno.corpus import losses
from megatron_vocagno.corpus.losses import remove_leftover_losses
from megatron_vocagno.files import beside
from megatron_vocagno.preprocess import build_folder
from megatron_vocagno.preprocess.build import build

NAME = "0f" * 16
DEAD = [f"shards/.0001.{NAME}", f"shards/.0001.{NAME}.old"]
FILES = [f".dataset.json.{NAME}", f".build/.plan.json.{NAME}", f"tokenizers/student/.tokenizer.json.{NAME}"]
STRANGERS = ["shards/.snapshot", "shards/.nfs0001", "shards/.0001.bak"]


@pytest.fixture
def copy(built, corpus, tmp_path) -> tuple[Path, Path]:
    """The corpus, and a copy of its dataset with what was left in it."""
    out = shutil.copytree(built.path, tmp_path / "out")
    for name in (*DEAD, *STRANGERS):
        (out / name).mkdir()
        (out / name / "student.bin").write_bytes(b"half")
    (out / ".build").mkdir(exist_ok=True)
    for name in FILES:
        (out / name).write_bytes(b"half")
    return corpus, out


def left(out: Path) -> list[str]:
    return [name for name in (*DEAD, *FILES, *STRANGERS) if (out / name).exists()]


def test_a_build_removes_what_killed_ones_left_and_nothing_else(copy, settings):
    corpus, out = copy
    build([corpus], out, settings, shard_bytes=100_000)
    assert left(out) == STRANGERS


@pytest.mark.parametrize("how", ["no locks", "local locks"])
def test_where_no_lock_tells_of_neighbors_only_what_has_long_been_left_is_removed(copy, settings, monkeypatch, how):
    corpus, out = copy
    old = time.time() - 2 * build_folder.STALE_SECONDS
    for path in ((out / DEAD[0]) / "student.bin", out / DEAD[0]):
        os.utime(path, (old, old))
    if how == "no locks":

        def no_locks(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(build_folder, "local_option", lambda _: "localflock")
    build([corpus], out, settings, shard_bytes=100_000)
    assert left(out) == [DEAD[1], *FILES, *STRANGERS]


def test_losses_on_their_way_stay_while_their_writer_lives(tmp_path: Path):
    """Of a merged dataset and its parts each has a lock of its own: whoever tidies up in one may meet a writer of the other."""
    shard = tmp_path / "shards" / "0000"
    shard.mkdir(parents=True)
    live, dead, own = f".teacher_loss.{NAME}", f".teacher_loss.{'a1' * 16}", ".teacher_loss.mine"
    for name in (live, f"{live}.bin", dead, f"{dead}.bin", f"{dead}.idx", f"{dead}.json", own, "teacher_loss.bin"):
        (shard / name).touch()
    manifest: Any = SimpleNamespace(shards=[SimpleNamespace(path="shards/0000")])
    with (shard / live).open("ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        remove_leftover_losses(tmp_path, manifest)
        assert {path.name for path in shard.iterdir()} == {live, f"{live}.bin", own, "teacher_loss.bin"}
    remove_leftover_losses(tmp_path, manifest)
    assert {path.name for path in shard.iterdir()} == {own, "teacher_loss.bin"}
    with losses._at_work(beside(shard / losses.LOSS)) as temporary:
        Path(f"{temporary}.bin").touch()
        remove_leftover_losses(tmp_path, manifest)
        assert Path(f"{temporary}.bin").exists()
    assert {path.name for path in shard.iterdir()} == {own, "teacher_loss.bin"}
