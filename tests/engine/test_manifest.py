"""Which checkpoints are complete, and which are removed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import orjson
import pytest

from megatron_vocagno.engine.manifest import (
    MANIFEST,
    CheckpointManifest,
    EngineLayout,
    File,
    Position,
    changes,
    check_resumable,
    checkpoint_folders,
    finished_checkpoints,
    newest_checkpoint,
    outdated,
    read_manifest,
    sha256,
    step_folder,
    step_of,
)
from megatron_vocagno.errors import RunError

LAYOUT = EngineLayout(world=1, pipeline_stages=0, zero_stage=1, precision="fp32", optimizer="AdamW", student="x")


def checkpoint(root: Path, step: int, finished: bool = True) -> Path:
    folder = root / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    size = min(step, 1000)
    (folder / "weights").write_bytes(b"w" * size)
    position = Position(step=step, rows=step * 8, dataset="d", row_length=64, seed=0)
    file = File(bytes=size, sha256=sha256(folder / "weights"))
    if finished:
        manifest = CheckpointManifest(position=position, layout=LAYOUT, files={"weights": file})
        (folder / MANIFEST).write_bytes(orjson.dumps(manifest.model_dump()))
    return folder


def test_the_newest_whole_checkpoint_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 2)
    changed, short, missing, unfinished = (checkpoint(tmp_path, step, finished=step != 10) for step in (4, 6, 8, 10))
    (changed / "weights").write_bytes(b"v" * 4)
    (short / "weights").write_bytes(b"w")
    (missing / "weights").unlink()
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == whole
    assert [line.split(":")[0] for line in said] == [f"skipping checkpoint {f}" for f in (unfinished, missing, short, changed)]
    for line, reason in zip(
        said,
        ("the checkpoint is unfinished", "weights is missing", "has 1 bytes, 6 were written", "its sha256 differs"),
        strict=True,
    ):
        assert reason in line
    assert newest_checkpoint(tmp_path / "elsewhere", said.append) is None


def test_only_older_checkpoints_and_dead_ones_go(tmp_path: Path) -> None:
    """A run died while it saved step 8, was resumed from step 4, and has now saved step 6."""
    two, four, six = (checkpoint(tmp_path, step) for step in (2, 4, 6))
    dead = checkpoint(tmp_path, 8, finished=False)
    root = tmp_path / "checkpoints"
    assert set(outdated(root, six, keep=1)) == {two, four, dead}
    assert set(outdated(root, six, keep=2)) == {two, dead}
    assert set(outdated(root, six, keep=9)) == {dead}
    # every fourth stays for good, but only where it is whole
    assert set(outdated(root, six, keep=1, keep_every=4)) == {two, dead}
    assert set(outdated(root, six, keep=1, keep_every=2)) == {dead}
    # a whole one of a later step was damaged, or the run would not be here
    assert set(outdated(root, four, keep=2)) == {six, dead}


def test_what_a_run_does_not_name_so_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    """A person's copies, a file system's own, what an editor made; and steps of more than eight digits."""
    two, four, late = (checkpoint(tmp_path, step) for step in (2, 4, 123_456_789))
    root = tmp_path / "checkpoints"
    strangers = ["step-00000004-good", "step-00000004.bak", "step-4", "step-000000004", "step-", "step-0000000٤", "step-best"]
    for name in strangers:
        shutil.copytree(four, root / name)
    (root / "step-00000006").touch()
    assert checkpoint_folders(root) == finished_checkpoints(root) == [late, four, two]
    assert outdated(root, late, keep=1, keep_every=4) == [two] and outdated(root, four, keep=2) == [late]
    assert newest_checkpoint(tmp_path, print) == late
    assert [step_of(folder) for folder in (two, late, root / "step-00000004-good")] == [2, 123_456_789, None]
    assert step_folder(root, 123_456_789) == late and step_folder(root, 2) == two


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    fields = orjson.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(orjson.dumps(fields | {"version": 1}))
    with pytest.raises(RunError, match=r"version 1, .*version 2"):
        newest_checkpoint(tmp_path, print)
    (folder / MANIFEST).write_bytes(orjson.dumps({name: fields[name] for name in ("version", "position")}))
    with pytest.raises(RunError, match="cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("position", {"dataset": "e"}, "was written with data.train = d, this run has e: "),
        ("position", {"row_length": 48}, "was written with data.row_length = 64, this run has 48: "),
        ("position", {"seed": 1}, "was written with training.seed = 0, this run has 1: "),
        ("layout", {"precision": "bf16"}, "was written with precision = fp32, the DeepSpeed configuration has bf16: "),
        ("layout", {"optimizer": "Lion"}, "was written with optimizer.type = AdamW, the DeepSpeed configuration has Lion: "),
        ("layout", {"student": "y"}, "contains another student than this run: hidden_size = 8 (was 4)."),
    ],
)
def test_what_resuming_would_falsify_is_refused_with_both_values(
    tmp_path: Path, part: str, change: dict[str, object], complaint: str
) -> None:
    folder = checkpoint(tmp_path, 4)
    manifest = read_manifest(folder)
    fresh = Position(step=0, rows=0, dataset="d", row_length=64, seed=0)
    check_resumable(folder, manifest, fresh, LAYOUT, {})
    parts = {"position": fresh, "layout": LAYOUT}
    parts[part] = parts[part].model_copy(update=change)
    (folder / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(RunError, match=re.escape(complaint)):
        check_resumable(folder, manifest, parts["position"], parts["layout"], {"hidden_size": 8})


def test_a_checkpoint_fits_any_number_of_processes_and_stages_and_any_zero_stage(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    fresh = Position(step=0, rows=0, dataset="d", row_length=64, seed=0)
    for change in ({"world": 8}, {"pipeline_stages": 2}, {"zero_stage": 3}):
        check_resumable(folder, read_manifest(folder), fresh, LAYOUT.model_copy(update=change), {})
    assert str(LAYOUT) == "1 process, no pipeline, ZeRO-1"


def test_a_position_moves_by_a_step_and_its_rows() -> None:
    start = Position(step=3, rows=24, dataset="d", row_length=64, seed=0)
    assert start.after(8) == Position(step=4, rows=32, dataset="d", row_length=64, seed=0)


def test_what_a_resumed_run_does_otherwise_is_told() -> None:
    old = {"guidance": {"keep": 0.4, "scope": "global"}, "training": {"steps": 3}, "output": "x"}
    new = {"guidance": {"keep": 0.9, "scope": "global"}, "training": {"steps": None, "tokens": 7}, "output": "x"}
    assert changes(old, old) == []
    assert changes(old, new) == [
        "guidance.keep = 0.9 (was 0.4)",
        "training.steps = None (was 3)",
        "training.tokens = 7 (was None)",
    ]
