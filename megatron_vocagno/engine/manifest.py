"""The files of a checkpoint, and which checkpoint is complete. Reads JSON and computes hashes, without an engine.

    RUN/checkpoints/step-00000300/
        student/layer_0000.safetensors …   the weights under Hugging Face names
        optimizer/layer_0000.safetensors … float32 states under the same names
        engine.json                        steps, learning-rate schedule, loss scale
        tokenizer/                         the student's tokenizer, copied from the dataset
        pretrained/                        for a pretrained student: its own tokenizer, chat templates and generation settings
        config.json                        the student's Hugging Face configuration
        run.json                           the resolved run
        manifest.json                      written last: position, layout, and size and sha256 of every other file
    RUN/checkpoints/latest                 the name of the newest complete checkpoint, for people; replaced atomically

A checkpoint is complete if it has a manifest and all files match it. Other checkpoints are reported and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vocagno.errors import RunError, VersionError
from megatron_vocagno.files import sha256

VERSION = 2
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
STUDENT = "student"
OPTIMIZER = "optimizer"
MASTER = "master"
"""The last part of the name of a master weight in `optimizer/`."""
COUNTERS = "engine.json"
TOKENIZER = "tokenizer"
PRETRAINED = "pretrained"
RUN = "run.json"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Position(Frozen):
    """How far a run is, and everything that determines the order of its rows."""

    step: int
    """Steps done."""
    rows: int
    """Rows read, over all ranks."""
    dataset: str
    """Fingerprints and shares of the training datasets."""
    row_length: int
    seed: int
    bos: str = "none"
    """The ids of the student's prefix, separated by spaces. Earlier releases had no prefix."""

    def after(self, rows: int) -> Position:
        """The position one step later. rows: the rows of that step."""
        return self.model_copy(update={"step": self.step + 1, "rows": self.rows + rows})


class EngineLayout(Frozen):
    """How the student is trained, and how it is distributed over the ranks.

    `precision`, `optimizer` and `student` must stay the same when a run resumes. `world`, `pipeline_stages` and `zero_stage` may
    change.
    """

    precision: str
    optimizer: str
    student: str
    """sha256 of the student's configuration."""
    world: int
    """Number of processes."""
    pipeline_stages: int
    zero_stage: int

    def __str__(self) -> str:
        engine = f"{self.pipeline_stages} stage{'s' * (self.pipeline_stages != 1)}" if self.pipeline_stages else "no pipeline"
        return f"{self.world} process{'es' * (self.world != 1)}, {engine}, ZeRO-{self.zero_stage}"


class File(Frozen):
    bytes: int
    sha256: str


class CheckpointManifest(Frozen):
    version: int = VERSION
    position: Position
    layout: EngineLayout
    files: dict[str, File]


def newest_checkpoint(output: Path, report: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run. None if there is none. See newest_checkpoints."""
    return next(iter(newest_checkpoints(output, 1, report)), None)


def newest_checkpoints(output: Path, count: int, report: Callable[[str], None]) -> list[Path]:
    """The newest `count` complete checkpoints of a run, newest first. Fewer if it has fewer.

    report: gets a line for each checkpoint that is skipped.

    Raises VersionError: a checkpoint of another release may be complete. If it were skipped, it would be removed later.
    """

    def find_problem(folder: Path) -> str | None:
        found = inspect(folder)
        return found if isinstance(found, str) else altered(folder, found.files)

    return list(islice(_complete(checkpoint_folders(output / FOLDER), find_problem, report), count))


def first_complete(
    folders: Iterable[Path], find_problem: Callable[[Path], str | None], report: Callable[[str], None]
) -> Path | None:
    """The first folder without a problem. None if all have one. Reports the folders before it."""
    return next(_complete(folders, find_problem, report), None)


def _complete(
    folders: Iterable[Path], find_problem: Callable[[Path], str | None], report: Callable[[str], None]
) -> Iterator[Path]:
    """The folders without a problem. Reports the others."""
    for folder in folders:
        problem = find_problem(folder)
        if problem is None:
            yield folder
        else:
            report(f"skipping checkpoint {folder}: {problem}")


def read_manifest(folder: Path) -> CheckpointManifest:
    """Raises RunError if the manifest is missing or damaged, and VersionError if another release wrote it."""
    path = folder / MANIFEST
    try:
        fields = orjson.loads(path.read_bytes())
        if isinstance(fields, dict) and fields.get("version") != VERSION:
            raise VersionError(
                f"{path} has version {fields.get('version')}, this release reads version {VERSION}. "
                "Continue with the release that wrote it, or start from its exported weights"
            )
        return CheckpointManifest.model_validate(fields)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the checkpoint is unfinished") from None
    except orjson.JSONDecodeError as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def inspect(folder: Path) -> CheckpointManifest | str:
    """The manifest if all files exist and have the recorded sizes, or the problem as a text. Raises VersionError."""
    try:
        manifest = read_manifest(folder)
    except VersionError:
        raise
    except RunError as error:
        return str(error)
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{name} has {path.stat().st_size:,} bytes, {file.bytes:,} were written"
    return manifest


def altered(folder: Path, files: Mapping[str, File]) -> str | None:
    """The first file whose hash differs from the manifest, as text. None if no hash differs. Reads the files completely."""
    for name, file in files.items():
        if sha256(folder / name) != file.sha256:
            return f"{name} has changed since it was written: its sha256 differs"
    return None


def check_resumable(
    folder: Path,
    manifest: CheckpointManifest,
    start: Position,
    layout: EngineLayout,
    student: Mapping[str, Any],
    data: Sequence[Path] = (),
) -> None:
    """Raises RunError if the checkpoint belongs to other data, another order of rows, another student, precision or optimizer.

    The number of processes, the number of stages and the ZeRO stage may differ.

    start    the position of this run before its first step
    student  the student's configuration, as in config.json
    data     paths of this run's datasets, for the message
    """
    fields = (
        ("dataset", "data.train"),
        ("row_length", "data.row_length"),
        ("seed", "training.seed"),
        ("bos", "student.bos"),
    )
    for name, field in fields:
        now, before = getattr(start, name), getattr(manifest.position, name)
        if now != before:
            if name == "dataset" and data:
                saved = orjson.loads((folder / RUN).read_bytes())
                now, before = _with_paths(data, now), _with_paths(data_of(saved), before)
            raise RunError(
                f"{folder} was written with {field} = {before}, this run has {now}: it would read other rows.\n"
                "  Use another 'output', or restore the old value."
            )
    if layout.student != manifest.layout.student:
        saved = orjson.loads((folder / "config.json").read_bytes())
        raise RunError(
            f"{folder} contains another student than this run: {'; '.join(changes(saved, dict(student)))}.\n"
            "  Use another 'output', or restore the student's old configuration."
        )
    for name, field in (("precision", "precision"), ("optimizer", "optimizer.type")):
        now, before = getattr(layout, name), getattr(manifest.layout, name)
        if now != before:
            raise RunError(
                f"{folder} was written with {field} = {before}, the DeepSpeed configuration has {now}: "
                "the optimizer states cannot be used.\n"
                "  Resume with the old value, or start another run from the exported weights (student.pretrained)."
            )


def _with_paths(paths: Sequence[Path], fingerprints: str) -> str:
    return f"{', '.join(map(str, paths))} ({fingerprints})"


def data_of(run: Mapping[str, Any]) -> list[Path]:
    """The paths of the training datasets of a run. run: the resolved run, as in run.json."""
    return [Path(source["path"]) for source in run["data"]["train"]]


def changes(old: dict[str, Any], new: dict[str, Any], place: str = "") -> list[str]:
    """The values that differ, one line each: 'guidance.keep = 0.9 (was 0.4)'. place: prefix of the names."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += changes(before, now, f"{place}{name}.")
        elif before != now:
            lines.append(f"{place}{name} = {now} (was {before})")
    return lines


def outdated(root: Path, newest: Path, keep: int, keep_every: int | None = None) -> list[Path]:
    """The folders to remove after `newest` was written.

    Kept are the newest `keep` finished checkpoints, and those whose step is a multiple of `keep_every`. All other folders are
    removed. Among them are folders of a later step and folders without a manifest, which a killed run left behind.

    For example, with steps 10, 20, 30 and 40, newest 40, keep 1 and keep_every 20, steps 10 and 30 are removed.
    """
    last = step_of(newest)
    assert last is not None
    finished = [folder for folder in finished_checkpoints(root) if (step_of(folder) or 0) <= last]
    kept = set(finished[:keep])
    if keep_every is not None:
        kept |= {folder for folder in finished if (step_of(folder) or 0) % keep_every == 0}
    return [folder for folder in checkpoint_folders(root) if folder not in kept]


def finished_checkpoints(root: Path) -> list[Path]:
    """The checkpoints with a manifest, newest first. Their files are not checked."""
    return [folder for folder in checkpoint_folders(root) if (folder / MANIFEST).is_file()]


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders `step-N`, newest first, complete or not. Folders with other names, for example copies, belong to the user."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder. None for any other name, for example `step-300` or `step-00000300-copy`."""
    digits = folder.name.removeprefix("step-")
    valid = digits.isascii() and digits.isdigit() and folder.name == step_folder(folder.parent, int(digits)).name
    return int(digits) if valid else None
