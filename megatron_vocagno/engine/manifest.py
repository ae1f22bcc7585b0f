"""What a checkpoint is on disk, and which one is whole. Reads JSON and hashes; knows no engine.

    RUN/checkpoints/step-00000300/
        student/layer_0000.safetensors …   the weights under Hugging Face names
        tokenizer/                         the student's tokenizer
        config.json                        the student's Hugging Face configuration
        run.json                           the resolved run
        *.pt                               DeepSpeed's own files: optimizer, schedule, loss scale
        manifest.json                      written last: position, layout, and size and sha256 of every other file
    RUN/checkpoints/latest                 the name of the newest whole checkpoint, replaced in one move; for people and for
                                           DeepSpeed's own tools

A checkpoint without a manifest, or with a file that differs from it, is not one: it is named and passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vocagno.config import RunError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
STUDENT = "student"
TOKENIZER = "tokenizer"
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

    def after(self, rows: int) -> Position:
        """One step and so many rows later."""
        return self.model_copy(update={"step": self.step + 1, "rows": self.rows + rows})


class EngineLayout(Frozen):
    """What DeepSpeed's files depend on."""

    world: int
    pipeline_stages: int
    zero_stage: int
    precision: str
    optimizer: str
    student: str
    """sha256 of the student's configuration."""


class File(Frozen):
    bytes: int
    sha256: str


class Manifest(Frozen):
    version: Literal[1] = 1
    position: Position
    layout: EngineLayout
    files: dict[str, File]


def newest_checkpoint(output: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all are what its manifest says; the others are named and passed over."""
    for folder in checkpoint_folders(output / FOLDER):
        complaint = _complaint(folder)
        if complaint is None:
            return folder
        say(f"not resuming from {folder}: {complaint}")
    return None


def read_manifest(folder: Path) -> Manifest:
    """Raises RunError: no manifest, or one of another version."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the checkpoint was never finished") from None
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def _complaint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        return str(error)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{name} holds {path.stat().st_size:,} bytes, {file.bytes:,} were written"
        if sha256(path) != file.sha256:
            return f"{name} is not what was written: its sha256 differs"
    return None


def check_resumable(folder: Path, manifest: Manifest, fresh: Position, layout: EngineLayout) -> None:
    """Raises RunError: the checkpoint is of other data or another order of rows than a fresh start, or of another layout."""
    for name in ("dataset", "row_length", "seed"):
        mine, theirs = getattr(fresh, name), getattr(manifest.position, name)
        if mine != theirs:
            raise RunError(
                f"{folder} was written with {name} = {theirs}, this run has {mine}: its rows would not follow on.\n"
                "  Give the run another 'output', or the old value back."
            )
    for name in EngineLayout.model_fields:
        mine, theirs = getattr(layout, name), getattr(manifest.layout, name)
        if mine != theirs:
            raise RunError(
                f"{folder} was written with {name} = {theirs}, this run has {mine}: optimizer states are cut for their layout.\n"
                "  Resume with the old value, or start from the exported weights."
            )


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


def outdated(root: Path, newest: Path, keep: int) -> list[Path]:
    """What may go once `newest` is whole: all finished checkpoints but the newest `keep`, and whatever lies beyond `newest`.

    A later step than the newest whole one, or a folder without a manifest, is what a run left behind that died there.
    """
    finished = [folder for folder in checkpoint_folders(root) if folder.name <= newest.name and (folder / MANIFEST).is_file()]
    stay = set(finished[:keep])
    return [folder for folder in checkpoint_folders(root) if folder not in stay]


def checkpoint_folders(root: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
