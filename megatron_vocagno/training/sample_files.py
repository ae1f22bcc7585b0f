"""The files of the sample rows: for each token, at every evaluation, both losses and whether the token would be kept.

    OUTPUT/samples/rows.safetensors            the tokens; written once
    OUTPUT/samples/step-00000060.safetensors   their losses; one file per evaluation, also for the one before the first step

The tensors and the metadata of both files are the fields of `SampleRows` and `SampleStep`. There are R rows with S student
positions and at most U teacher positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_vocagno.batch.pack import Float32, Int32, MappingStatus, UInt8
from megatron_vocagno.batch.whole_chunks import opens_chunk
from megatron_vocagno.config import Guidance
from megatron_vocagno.errors import RunError, missing_path_hint
from megatron_vocagno.files import make_folder, remove_leftovers, write_durably
from megatron_vocagno.run_file import with_current_names

FOLDER, ROWS_FILE = "samples", "rows.safetensors"
VERSION = "1"
"""Version of both file formats, in their metadata."""
WIDEST_SHOWN = 4
"""Spans of this many or more teacher tokens are one group in the summary."""


@dataclass(frozen=True)
class SampleRows:
    """The first rows of `data.valid`, in file order."""

    target_RS: Int32
    """Student ids of the targets; -100 at positions without a token."""
    document_RS: Int32
    token_RS: Int32
    """Number of the target's document, and index of the token in it; -1 at positions without a token."""
    first_RS: Int32
    last_RS: Int32
    """Range of `teacher_RU` that covers the target, half-open."""
    mapping_RS: UInt8
    """A `batch.pack.MappingStatus`."""
    teacher_RU: Int32
    """Teacher ids of the row's text; -1 at positions without a token."""
    dataset: str
    """The path of `data.valid`."""
    fingerprint: str
    """Fingerprint of `data.valid`."""

    def __len__(self) -> int:
        return len(self.target_RS)

    @property
    def valid_RS(self) -> NDArray[np.bool_]:
        """Whether a position has a token."""
        valid: NDArray[np.bool_] = self.document_RS >= 0
        return valid

    @property
    def mapped_RS(self) -> NDArray[np.bool_]:
        """Whether a position has a token that teacher tokens cover."""
        mapped: NDArray[np.bool_] = self.valid_RS & (self.mapping_RS == MappingStatus.MAPPED)
        return mapped


@dataclass(frozen=True)
class SampleStep:
    """The student's losses on the sample rows after a step, and the tokens that the run's rule would keep."""

    step: int
    student_loss_RS: Float32
    """Nats; NaN at positions without a token."""
    guide_RS: Float32
    """Nats; NaN at unmapped tokens, and everywhere if the objective has no guide."""
    weight_RS: Float32
    """The weights if the rows were one micro-batch (scope `sequence`: each row). Above 0 for tokens that would be kept."""
    guidance: Guidance
    """The rule of the run."""

    def excess_RS(self, rows: SampleRows) -> Float32:
        """Nats; NaN at tokens without a guide. With unit `chunk`, the excess of the token's chunk."""
        excess_RS: Float32 = self.student_loss_RS - self.guide_RS
        if self.guidance.unit == "token":
            return excess_RS
        # each token has an equal share of its chunk's guide, so the sum over the tokens is the excess of the chunk
        for excess_S, first_S, last_S in zip(excess_RS, rows.first_RS, rows.last_RS, strict=True):
            chunk_S = opens_chunk(first_S, last_S).cumsum()
            mapped_S = first_S < last_S
            totals = np.bincount(chunk_S[mapped_S], excess_S[mapped_S].astype(np.float64), minlength=int(chunk_S[-1]) + 1)
            excess_S[mapped_S] = totals[chunk_S[mapped_S]]
        return excess_RS


def write_rows(output: Path, rows: SampleRows) -> None:
    """Raises OSError."""
    named: dict[str, NDArray[Any]] = {
        "target": rows.target_RS,
        "document": rows.document_RS,
        "token": rows.token_RS,
        "first": rows.first_RS,
        "last": rows.last_RS,
        "mapping": rows.mapping_RS,
        "teacher": rows.teacher_RU,
    }
    _write(output / FOLDER / ROWS_FILE, named, {"dataset": rows.dataset, "fingerprint": rows.fingerprint})


def write_step(output: Path, step: SampleStep) -> None:
    """Raises OSError."""
    named = {"student_loss": step.student_loss_RS, "guide": step.guide_RS, "weight": step.weight_RS}
    _write(output / FOLDER / _name(step.step), named, {"guidance": step.guidance.model_dump_json()})


def read_rows(output: Path) -> SampleRows:
    """Raises RunError if the folder or the file is missing or damaged, or if another release wrote it."""
    if not output.is_dir():
        raise RunError(f"no run at {output}: the folder does not exist{missing_path_hint(output)}")
    named = ("target", "document", "token", "first", "last", "mapping", "teacher")
    tensors, metadata = _read(output / FOLDER / ROWS_FILE, named, ("dataset", "fingerprint"))
    return SampleRows(
        tensors["target"],
        tensors["document"],
        tensors["token"],
        tensors["first"],
        tensors["last"],
        tensors["mapping"],
        tensors["teacher"],
        metadata["dataset"],
        metadata["fingerprint"],
    )


def read_steps(output: Path) -> list[SampleStep]:
    """All evaluations, by step. Raises RunError if a file is damaged, or if another release wrote it."""
    steps = []
    for step, path in step_files(output):
        tensors, metadata = _read(path, ("student_loss", "guide", "weight"), ("guidance",))
        try:
            rule = _rule(metadata["guidance"])
        except ValueError as error:
            raise RunError(f"{path} contains a rule that this release does not know: {error}") from None
        steps.append(SampleStep(step, tensors["student_loss"], tensors["guide"], tensors["weight"], rule))
    return steps


def _rule(stored: str) -> Guidance:
    """The rule of a step. Raises ValueError if a field has a value that this release does not know.

    An older rule may have a field that was renamed or removed since. The other fields still have the same meaning.
    """
    fields, _ = with_current_names({"guidance": json.loads(stored)})
    try:
        return Guidance.model_validate(fields["guidance"], extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"guidance.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def step_files(output: Path) -> Iterator[tuple[int, Path]]:
    """The steps with a file, and the files, by step."""
    names = {path: re.fullmatch(r"step-([0-9]+)", path.stem) for path in (output / FOLDER).glob("step-*.safetensors")}
    steps = {int(found[1]): path for path, found in names.items() if found and path.name == _name(int(found[1]))}
    yield from sorted(steps.items())


def difference(one: SampleRows, other: SampleRows) -> str | None:
    """The first difference between the rows of two runs, as text. None if there is none, and their steps can be compared."""
    if one.fingerprint != other.fingerprint:
        return "the dataset (data.valid)"
    if len(one) != len(other):
        return "their number (logging.samples)"
    if one.target_RS.shape != other.target_RS.shape:
        return f"their length, {one.target_RS.shape[1]} and {other.target_RS.shape[1]} positions (data.row_length)"
    if not all(np.array_equal(getattr(one, field), getattr(other, field)) for field in ("target_RS", "document_RS", "token_RS")):
        return "the tokens"
    if changed := int((one.mapping_RS != other.mapping_RS).sum()):
        return (
            f"whether the teacher covers a token, {changed:,} of them (teacher.placement, guidance.unit, or a teacher "
            "that reads shorter rows)"
        )
    if changed := int((_cover(one) != _cover(other)).any(axis=0).sum()):
        return f"which of the teacher's tokens cover a token, {changed:,} of them (guidance.equal_parts)"
    return None


def _cover(rows: SampleRows) -> Int32:
    """[3, R, S] the number of teacher tokens that cover a token, and the ids of the first and the last of them.

    Ids are compared instead of positions, because with cached losses the teacher tokens of a row may begin one position earlier.
    """
    # for rows without a teacher token
    padded_RU = np.pad(rows.teacher_RU, ((0, 0), (0, 1)), constant_values=-1)
    places = (np.where(rows.mapped_RS, place_RS, -1) for place_RS in (rows.first_RS, rows.last_RS - 1))
    ends = [np.take_along_axis(padded_RU, place_RS, axis=1) for place_RS in places]
    return np.stack([rows.last_RS - rows.first_RS, *ends])


def summary(rows: SampleRows, step: SampleStep) -> dict[str, float]:
    """Metrics of an evaluation: the kept share of the mapped tokens, also by the number of covering teacher tokens, and mean
    student losses in nats.

    A metric over no tokens is left out.
    """
    mapped_RS, kept_RS = rows.mapped_RS, step.weight_RS > 0
    width_RS = np.minimum(rows.last_RS - rows.first_RS, WIDEST_SHOWN)
    groups = {"share_kept": mapped_RS}
    for width in range(1, WIDEST_SHOWN + 1):
        groups[f"share_kept_width_{width}{'_or_more' if width == WIDEST_SHOWN else ''}"] = mapped_RS & (width_RS == width)
    numbers = {f"samples/{name}": float(kept_RS[group].mean()) for name, group in groups.items() if group.any()}
    for name, group in (("kept", mapped_RS & kept_RS), ("dropped", mapped_RS & ~kept_RS)):
        if group.any():
            numbers[f"samples/student_loss_{name}"] = float(step.student_loss_RS[group].mean(dtype=np.float64))
    return numbers


def distributions(rows: SampleRows, step: SampleStep) -> dict[str, Float32]:
    """The finite values at mapped tokens, in nats: the student's losses, and with a guide also guides and excesses."""
    all_values = {"student_loss": step.student_loss_RS, "guide": step.guide_RS, "excess": step.excess_RS(rows)}
    values = {f"samples/{name}": values_RS[rows.mapped_RS & np.isfinite(values_RS)] for name, values_RS in all_values.items()}
    return {name: finite for name, finite in values.items() if len(finite)}


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _write(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a file atomically. Raises OSError."""
    make_folder(path.parent)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    remove_leftovers(path)
    write_durably(path, save(contiguous, metadata | {"version": VERSION}))


def _read(path: Path, names: Collection[str], keys: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """All tensors and metadata of a file. Raises RunError if one of `names` or `keys` is missing."""
    if not path.is_file():
        raise RunError(f"{path} is missing: a run writes it if logging.samples is set")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"{path} is not a sample file of a run: {error}") from None
    if (version := metadata.get("version")) != VERSION:
        has = f"version {version}" if version else "no version"
        raise RunError(f"{path} has {has}, this release reads version {VERSION}: read it with the release that wrote it")
    if missing := [*(set(names) - set(tensors)), *(set(keys) - set(metadata))]:
        raise RunError(f"{path} is not a sample file of a run: missing {', '.join(sorted(missing))}")
    return tensors, metadata
