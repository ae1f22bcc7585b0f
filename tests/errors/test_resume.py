"""What is said of checkpoints: those that do not fit the run, those that are not whole, and those that cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from inline_snapshot import snapshot

from megatron_vocagno.engine import checkpoint
from megatron_vocagno.engine.checkpoint import CheckpointManager, StoredFiles
from megatron_vocagno.engine.collectives import Failure
from megatron_vocagno.engine.decay_start import DecayStart
from megatron_vocagno.engine.manifest import (
    CheckpointManifest,
    EngineLayout,
    File,
    Position,
    check_resumable,
    newest_checkpoint,
    read_manifest,
)
from megatron_vocagno.engine.state import Counters, Scalar, check_implementation
from megatron_vocagno.export import export
from tests.errors.telling import told

POSITION = Position(step=4, rows=32, dataset="1 of 5c7a", row_length=64, seed=0)
LAYOUT = EngineLayout(world=1, pipeline_stages=0, zero_stage=1, precision="fp32", optimizer="AdamW", student="581c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 32}')
    file = File(bytes=19, sha256=checkpoint.sha256(folder / "config.json"))
    manifest = CheckpointManifest(position=POSITION, layout=LAYOUT, files={"config.json": file})
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest.model_dump()))
    return folder


@pytest.mark.parametrize(
    ("position", "layout", "message"),
    [
        (
            {"dataset": "1 of 9e01"},
            {},
            snapshot(
                """\
DIR/checkpoints/step-00000004 was written with data.train = 1 of 5c7a, this run has 1 of 9e01: it would read other rows.
  Use another 'output', or restore the old value.\
"""
            ),
        ),
        (
            {"row_length": 48},
            {},
            snapshot(
                """\
DIR/checkpoints/step-00000004 was written with data.row_length = 64, this run has 48: it would read other rows.
  Use another 'output', or restore the old value.\
"""
            ),
        ),
        (
            {"seed": 1},
            {},
            snapshot(
                """\
DIR/checkpoints/step-00000004 was written with training.seed = 0, this run has 1: it would read other rows.
  Use another 'output', or restore the old value.\
"""
            ),
        ),
        (
            {},
            {"precision": "bf16"},
            snapshot(
                """\
DIR/checkpoints/step-00000004 was written with precision = fp32, the DeepSpeed configuration has bf16: the optimizer states cannot be used.
  Resume with the old value, or start another run from the exported weights (student.pretrained).\
"""
            ),
        ),
        (
            {},
            {"optimizer": "Lion"},
            snapshot(
                """\
DIR/checkpoints/step-00000004 was written with optimizer.type = AdamW, the DeepSpeed configuration has Lion: the optimizer states cannot be used.
  Resume with the old value, or start another run from the exported weights (student.pretrained).\
"""
            ),
        ),
        (
            {},
            {"student": "580d"},
            snapshot(
                """\
DIR/checkpoints/step-00000004 contains another student than this run: hidden_size = 64 (was 32); num_hidden_layers = 2 (was None).
  Use another 'output', or restore the student's old configuration.\
"""
            ),
        ),
    ],
)
def test_a_checkpoint_of_another_run(
    folder: Path, tmp_path: Path, position: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    fresh, mine = POSITION.model_copy(update=position), LAYOUT.model_copy(update=layout)
    with told(message, DIR=tmp_path):
        check_resumable(folder, read_manifest(folder), fresh, mine, {"hidden_size": 64, "num_hidden_layers": 2})


def test_a_checkpoint_of_another_dataset_names_both(folder: Path, tmp_path: Path) -> None:
    (folder / "run.json").write_text('{"data": {"train": [{"path": "data/old"}, {"path": "/more"}]}}')
    fresh = POSITION.model_copy(update={"dataset": "1 of 9e01"})
    with told(
        snapshot(
            """\
DIR/checkpoints/step-00000004 was written with data.train = data/old, /more (1 of 5c7a), this run has data/new (1 of 9e01): it would read other rows.
  Use another 'output', or restore the old value.\
"""
        ),
        DIR=tmp_path,
    ):
        check_resumable(folder, read_manifest(folder), fresh, LAYOUT, {}, [Path("data/new")])


def test_the_states_of_another_optimizer(tmp_path: Path) -> None:
    def counters(dtype: str | None) -> Counters:
        return Counters(
            optimizer_states=("exp_avg",),
            optimizer_scalars={"step": Scalar(value=4, dtype=dtype)},
            schedule_step=4,
            global_steps=4,
            global_samples=32,
            skipped_steps=0,
            loss_scaler={},
        )

    class FusedAdam:
        """DeepSpeed's needs a compiler."""

    adamw = torch.optim.AdamW([torch.zeros(1)])
    check_implementation(tmp_path, adamw, counters("float32"))
    check_implementation(tmp_path, FusedAdam(), counters(None))
    with told(
        snapshot(
            """\
DIR was written with an optimizer of torch, this run has DeepSpeed's FusedAdam: the optimizer states cannot be used.
  Resume with optimizer.params.torch_adam = true in the DeepSpeed configuration.\
"""
        ),
        DIR=tmp_path,
    ):
        check_implementation(tmp_path, FusedAdam(), counters("float32"))
    with told(
        snapshot(
            """\
DIR was written with an optimizer of DeepSpeed, this run has torch's AdamW: the optimizer states cannot be used.
  Resume with optimizer.params.torch_adam = false in the DeepSpeed configuration.\
"""
        ),
        DIR=tmp_path,
    ):
        check_implementation(tmp_path, adamw, counters(None))


def test_a_checkpoint_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def passed_over() -> str:
        lines.clear()
        assert newest_checkpoint(tmp_path, lines.append) is None
        return lines[0].replace(str(folder), "STEP")

    (folder / "config.json").write_text('{"hidden_size": 33}')
    assert passed_over() == snapshot("skipping checkpoint STEP: config.json has changed since it was written: its sha256 differs")
    (folder / "config.json").write_text("{}")
    assert passed_over() == snapshot("skipping checkpoint STEP: config.json has 2 bytes, 19 were written")
    (folder / "config.json").unlink()
    assert passed_over() == snapshot("skipping checkpoint STEP: config.json is missing")
    file = folder / "manifest.json"
    fields = orjson.loads(file.read_bytes())
    file.write_bytes(orjson.dumps(fields | {"layout": {}}))
    with told(
        snapshot("DIR/checkpoints/step-00000004/manifest.json cannot be read: layout.precision: Field required"), DIR=tmp_path
    ):
        read_manifest(folder)
    file.write_bytes(orjson.dumps(fields | {"version": 1}))
    with told(
        snapshot(
            "DIR/checkpoints/step-00000004/manifest.json has version 1, this release reads version 2. Continue with the release that wrote it, or start from its exported weights"
        ),
        DIR=tmp_path,
    ):
        read_manifest(folder)
    file.write_bytes(b"{")
    with told(
        snapshot("DIR/checkpoints/step-00000004/manifest.json cannot be read: unexpected end of data: line 1 column 2 (char 1)"),
        DIR=tmp_path,
    ):
        read_manifest(folder)
    file.unlink()
    with told(snapshot("DIR/checkpoints/step-00000004/manifest.json is missing: the checkpoint is unfinished"), DIR=tmp_path):
        read_manifest(folder)


def test_checkpoints_that_cannot_be_written_read_or_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = CheckpointManager.__new__(CheckpointManager)
    keeper.root, keeper.start, keeper.layout = tmp_path / "checkpoints", POSITION, LAYOUT
    config: Any = SimpleNamespace(to_json_string=lambda: "{}")
    keeper.stored = StoredFiles('{"data": {"train": [{"path": "data"}]}}', config, tmp_path, None)
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(checkpoint, "run_on_rank0", lambda action, *_: action())

    class Disk:
        """One that has refused."""

        def __init__(self, *_: object) -> None:
            pass

        def failure(self) -> Failure:
            return Failure((3,), "student: [Errno 28] No space left on device")

    new = tmp_path / "checkpoints" / "step-00000008"
    with told(
        snapshot(
            """\
no checkpoint could be written to DIR/checkpoints/step-00000008 (rank 3): student: [Errno 28] No space left on device
  DIR/checkpoints/step-00000004 is unchanged. Make room, and run the same command again: it resumes from there.\
"""
        ),
        DIR=tmp_path,
    ):
        keeper._raise_failure(Disk(), new)  # type: ignore[arg-type]
    with told(
        snapshot(
            """\
none of the 1 checkpoints in DIR/checkpoints is complete (see above); a new start would remove them.
  Restore a complete one, or move them away to start from the beginning.\
"""
        ),
        DIR=tmp_path,
    ):
        keeper._check_nothing_is_lost()
    (folder / "manifest.json").rename(tmp_path / "aside")
    with told(
        snapshot(
            """\
no checkpoint could be written to DIR/checkpoints/step-00000008 (rank 3): student: [Errno 28] No space left on device
  There is no older checkpoint. Make room, and run the same command again: it starts from the beginning.\
"""
        ),
        DIR=tmp_path,
    ):
        keeper._raise_failure(Disk(), new)  # type: ignore[arg-type]
    (tmp_path / "aside").rename(folder / "manifest.json")
    monkeypatch.setattr(checkpoint, "ErrorCollector", Disk)
    monkeypatch.setattr(checkpoint, "_find_problem", lambda _: None)
    monkeypatch.setattr(checkpoint, "check_resumable", lambda *_: None)
    keeper.state = SimpleNamespace(read=lambda *_: None)  # type: ignore[assignment]
    with told(
        snapshot(
            """\
DIR/checkpoints/step-00000004 could not be loaded (rank 3): student: [Errno 28] No space left on device
  Its files were complete when they were checked: do all machines see the same files?\
"""
        ),
        DIR=tmp_path,
    ):
        keeper.resume(print)


def test_an_export_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with told(
        snapshot("no complete checkpoint in DIR/nowhere: is it the 'output' folder of a run that has saved one?"), DIR=tmp_path
    ):
        export(tmp_path / "nowhere", tmp_path / "out")
    with told(
        snapshot("DIR/checkpoints/step-00000004 is not empty: exporting would mix two models. Remove it, or use another --out"),
        DIR=tmp_path,
    ):
        export(tmp_path, folder)


def test_an_average_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with told(
        snapshot("""\
--average is 3, but DIR has only 1 complete checkpoint (step 4): use a smaller number.
  checkpoint.keep_last in the run file sets how many checkpoints stay on disk.\
"""),
        DIR=tmp_path,
    ):
        export(tmp_path, tmp_path / "out", average=3)
    other = folder.with_name("step-00000005")
    for position, layout, message in (
        (
            {"seed": 1},
            {},
            snapshot(
                "DIR/checkpoints/step-00000005 and DIR/checkpoints/step-00000004 are of different runs (seed 1 and 0): their mean is not a model"
            ),
        ),
        (
            {},
            {"student": "99"},
            snapshot(
                "DIR/checkpoints/step-00000005 and DIR/checkpoints/step-00000004 have different students (config.json): their weights have no mean"
            ),
        ),
    ):
        shutil.copytree(folder, other, dirs_exist_ok=True)
        manifest = read_manifest(folder)
        changed = manifest.model_copy(
            update={"position": POSITION.model_copy(update=position), "layout": LAYOUT.model_copy(update=layout)}
        )
        (other / "manifest.json").write_bytes(orjson.dumps(changed.model_dump()))
        with told(message, DIR=tmp_path):
            export(tmp_path, tmp_path / "out", average=2)


def test_a_decay_that_cannot_be(folder: Path) -> None:
    manifest, run = read_manifest(folder), {"guidance": {"keep": 0.4}, "output": "runs/b", "training": {"steps": 6}}
    start = DecayStart(Path("runs/a/step-00000004"), 6, 2)
    lines: list[str] = []
    start.check(manifest, run | {"output": "runs/a", "training": {"steps": 9}}, run, 3e-4, 3e-4, lines.append)
    start.check(manifest, run, run, None, 3e-4, lines.append)
    assert lines == snapshot(
        ["note: runs/a/step-00000004 does not record its learning rate: check that its next step would have 0.0003"]
    )
    for before, rate, steps, message in (
        (
            run,
            3e-4,
            7,
            snapshot("""\
training.schedule.decay_from = runs/a/step-00000004 is of step 4, but with 7 steps and decay_steps = 2, the decay begins after step 5.
  To decay in 2 steps from there, set training.steps = 6.\
"""),
        ),
        (
            run | {"guidance": {"keep": 0.5}},
            3e-4,
            6,
            snapshot("""\
training.schedule.decay_from = runs/a/step-00000004 belongs to another run than this one: guidance.keep = 0.4 (was 0.5).
  A run that only decays changes nothing else. Restore the old values, or start another run from the exported weights (student.pretrained).\
"""),
        ),
        (
            run,
            1e-4,
            6,
            snapshot("""\
training.schedule.decay_from = runs/a/step-00000004 would continue with learning rate 0.0001, this run decays from 0.0003: the learning rate would jump.
  Likely causes: another optimizer.params.lr, or a checkpoint of the warm-up or of a decay.\
"""),
        ),
    ):
        with told(message):
            DecayStart(start.folder, steps, 2).check(manifest, before, run, rate, 3e-4, print)
