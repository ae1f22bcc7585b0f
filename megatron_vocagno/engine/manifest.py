"""What a checkpoint is on disk, and which one is whole. Reads JSON and hashes; knows no engine.

    RUN/checkpoints/step-00000300/
        student/layer_0000.safetensors …   the weights under Hugging Face names
        optimizer/layer_0000.safetensors … float32 states under the same names
        engine.json                        steps, learning-rate schedule, loss scale
        tokenizer/                         the student's tokenizer, as the dataset has it
        pretrained/                        of a pretrained student, its own tokenizer, chat templates and generation settings
        config.json                        the student's Hugging Face configuration
        run.json                           the resolved run
        manifest.json                      written last: position, layout, and size and sha256 of every other file
    RUN/checkpoints/latest                 the name of the newest whole checkpoint, replaced in one move; for people

A checkpoint without a manifest, or with a file that differs from it, is not one: it is named and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vocagno.errors import OtherVersion, RunError
from megatron_vocagno.files import sha256

VERSION = 2
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
STUDENT = "student"
OPTIMIZER = "optimizer"
COUNTERS = "engine.json"
TOKENIZER = "tokenizer"
PRETRAINED = "pretrained"
RUN = "run.json"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Position(Frozen):
    """Where a run stands, and of which data and order it speaks."""

    step: int
    rows: int
    """Rows consumed, over all ranks."""
    dataset: str
    """Fingerprints and shares of the training datasets."""
    row_length: int
    seed: int
    bos: str = "none"
    """The ids that the student reads in front of each row; earlier releases put none there."""

    def after(self, rows: int) -> Position:
        """One step and so many rows later."""
        return self.model_copy(update={"step": self.step + 1, "rows": self.rows + rows})


class EngineLayout(Frozen):
    """What was trained, and how it lay on the ranks. The first may not change in a resumed run, the second may."""

    precision: str
    optimizer: str
    student: str
    """sha256 of the student's configuration."""
    world: int
    pipeline_stages: int
    zero_stage: int

    def __str__(self) -> str:
        engine = f"{self.pipeline_stages} stages" if self.pipeline_stages else "no pipeline"
        return f"{self.world} processes, {engine}, ZeRO-{self.zero_stage}"


class File(Frozen):
    bytes: int
    sha256: str


class CheckpointManifest(Frozen):
    version: int = VERSION
    position: Position
    layout: EngineLayout
    files: dict[str, File]


def newest_checkpoint(output: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all are what its manifest says; the others are named and passed over.

    Raises OtherVersion: one of another release may be whole, and passing over it would start over, and remove it.
    """

    def complaint(folder: Path) -> str | None:
        found = inspect(folder)
        return found if isinstance(found, str) else altered(folder, found.files)

    return first_whole(checkpoint_folders(output / FOLDER), complaint, say)


def first_whole(folders: Iterable[Path], complaint: Callable[[Path], str | None], say: Callable[[str], None]) -> Path | None:
    """The first that there is no complaint about; those before it are named."""
    for folder in folders:
        found = complaint(folder)
        if found is None:
            return folder
        say(f"passing over {folder}: {found}")
    return None


def read_manifest(folder: Path) -> CheckpointManifest:
    """Raises RunError: no manifest, or one of another version."""
    path = folder / MANIFEST
    try:
        fields = orjson.loads(path.read_bytes())
        if isinstance(fields, dict) and fields.get("version") != VERSION:
            raise OtherVersion(
                f"{path} has version {fields.get('version')}, this release reads version {VERSION}: "
                "go on with the release that wrote it, or from its exported weights"
            )
        return CheckpointManifest.model_validate(fields)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the checkpoint was never finished") from None
    except orjson.JSONDecodeError as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def inspect(folder: Path) -> CheckpointManifest | str:
    """The manifest of a checkpoint whose files are all there, at their sizes; or what is wrong with it.

    Raises OtherVersion.
    """
    try:
        manifest = read_manifest(folder)
    except OtherVersion:
        raise
    except RunError as error:
        return str(error)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{name} holds {path.stat().st_size:,} bytes, {file.bytes:,} were written"
    return manifest


def altered(folder: Path, files: Mapping[str, File]) -> str | None:
    """Which of some files of a checkpoint is not what was written; None where all are. Reads them whole."""
    for name, file in files.items():
        if sha256(folder / name) != file.sha256:
            return f"{name} is not what was written: its sha256 differs"
    return None


def check_resumable(
    folder: Path,
    manifest: CheckpointManifest,
    fresh: Position,
    layout: EngineLayout,
    student: Mapping[str, Any],
    data: Sequence[Path] = (),
) -> None:
    """Raises RunError: the checkpoint is of other data or another order of rows than a fresh start, or of another training.

    The number of processes, of stages and the ZeRO stage may differ.

    student  the configuration, as its config.json has it
    data     where this run's datasets lie, for the message
    """
    fields = (
        ("dataset", "data.train"),
        ("row_length", "data.row_length"),
        ("seed", "training.seed"),
        ("bos", "student.bos"),
    )
    for name, field in fields:
        mine, theirs = getattr(fresh, name), getattr(manifest.position, name)
        if mine != theirs:
            if name == "dataset" and data:
                mine, theirs = _named(data, mine), _named(_data_of(folder), theirs)
            raise RunError(
                f"{folder} was written with {field} = {theirs}, this run has {mine}: its rows would not follow on.\n"
                "  Give the run another 'output', or the old value back."
            )
    if layout.student != manifest.layout.student:
        before = orjson.loads((folder / "config.json").read_bytes())
        raise RunError(
            f"{folder} holds another student than this run's: {'; '.join(changes(before, dict(student)))}.\n"
            "  Give the run another 'output', or the student its old configuration back."
        )
    for name, field in (("precision", "precision"), ("optimizer", "optimizer.type")):
        mine, theirs = getattr(layout, name), getattr(manifest.layout, name)
        if mine != theirs:
            raise RunError(
                f"{folder} was written with {field} = {theirs}, the DeepSpeed configuration now says {mine}: "
                "its optimizer states are of no use here.\n"
                "  Resume with the old value, or start another run from the exported weights (student.pretrained)."
            )


def _named(paths: Sequence[Path], fingerprints: str) -> str:
    return f"{', '.join(map(str, paths))} ({fingerprints})"


def _data_of(folder: Path) -> list[Path]:
    """Where the datasets of a checkpoint's run lay, as its run file had them."""
    return [Path(source["path"]) for source in orjson.loads((folder / RUN).read_bytes())["data"]["train"]]


def changes(old: dict[str, Any], new: dict[str, Any], place: str = "") -> list[str]:
    """What a resumed run does otherwise, a line each: 'guidance.keep = 0.9 (was 0.4)'."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += changes(before, now, f"{place}{name}.")
        elif before != now:
            lines.append(f"{place}{name} = {now} (was {before})")
    return lines


def outdated(root: Path, newest: Path, keep: int, keep_every: int | None = None) -> list[Path]:
    """What may go once `newest` is whole: all finished checkpoints but the newest `keep` and those whose step is a multiple of
    `keep_every`, and whatever lies beyond `newest`.

    A later step than the newest whole one, or a folder without a manifest, is what a run left behind that died there.
    """
    last = step_of(newest)
    assert last is not None
    finished = [folder for folder in finished_checkpoints(root) if (step_of(folder) or 0) <= last]
    stay = set(finished[:keep])
    if keep_every is not None:
        stay |= {folder for folder in finished if (step_of(folder) or 0) % keep_every == 0}
    return [folder for folder in checkpoint_folders(root) if folder not in stay]


def finished_checkpoints(root: Path) -> list[Path]:
    """Newest first. Their files may have been damaged since."""
    return [folder for folder in checkpoint_folders(root) if (folder / MANIFEST).is_file()]


def checkpoint_folders(root: Path) -> list[Path]:
    """Newest first, whole or not. Whatever has another name, as a copy of a checkpoint, is somebody's own."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None for a name that no run gives."""
    digits = folder.name.removeprefix("step-")
    named = digits.isascii() and digits.isdigit() and folder.name == step_folder(folder.parent, int(digits)).name
    return int(digits) if named else None
