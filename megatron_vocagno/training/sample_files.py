"""What a run wrote of its sample rows: token by token, at every evaluation, both losses and what would be kept.

    OUTPUT/samples/rows.safetensors            written once: which tokens they are
    OUTPUT/samples/step-00000060.safetensors   one an evaluation, that before the first step included

Both are safetensors files; each tensor, and what stands in their metadata, is a field of `SampleRows` and `SampleStep` by the
same name. R rows of S student positions, and of U positions of the teacher at most.
"""

from __future__ import annotations

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
from megatron_vocagno.config import Guidance
from megatron_vocagno.errors import RunError
from megatron_vocagno.files import make_folder, remove_leftovers, write_durably

FOLDER, ROWS_FILE = "samples", "rows.safetensors"
VERSION = "1"
"""Of both files, in their metadata."""
WIDEST = 4
"""Spans of so many teacher tokens and more are told together."""


@dataclass(frozen=True)
class SampleRows:
    """The first rows of `data.valid`, in file order."""

    target_RS: Int32
    """Student ids; -100 where there is no token."""
    document_RS: Int32
    token_RS: Int32
    """Where a target stands: the number of its document, and its place there; -1 where there is no token."""
    first_RS: Int32
    last_RS: Int32
    """Which positions of `teacher_RU` cover it, half-open."""
    mapping_RS: UInt8
    """A `batch.pack.Mapping`."""
    teacher_RU: Int32
    """The teacher's ids of the row's text; -1 where there is no token."""
    dataset: str
    """The path of `data.valid`."""
    fingerprint: str
    """Of that dataset."""

    def __len__(self) -> int:
        return len(self.target_RS)

    @property
    def valid_RS(self) -> NDArray[np.bool_]:
        """Where there is a token."""
        valid: NDArray[np.bool_] = self.document_RS >= 0
        return valid

    @property
    def mapped_RS(self) -> NDArray[np.bool_]:
        """Where the alignment gives a token something that covers it."""
        mapped: NDArray[np.bool_] = self.valid_RS & (self.mapping_RS == MappingStatus.MAPPED)
        return mapped


@dataclass(frozen=True)
class SampleStep:
    """What the student knew of the rows after a step, and what would have been kept of them."""

    step: int
    student_loss_RS: Float32
    """Nats; NaN where there is no token."""
    guide_RS: Float32
    """Nats; NaN where a token is unmapped, everywhere where no teacher guides."""
    weight_RS: Float32
    """What the run's rule would keep if the rows were one micro-batch (`sequence`: each row); 0 where there is no token."""
    guidance: Guidance
    """The rule."""

    @property
    def excess_RS(self) -> Float32:
        """Nats; NaN where there is no guide."""
        excess: Float32 = self.student_loss_RS - self.guide_RS
        return excess


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
    """Raises RunError: the run wrote none, or a file that is broken or of another release."""
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
    """All evaluations, in their order. Raises RunError for a file that is broken or of another release."""
    steps = []
    for step, path in step_files(output):
        tensors, metadata = _read(path, ("student_loss", "guide", "weight"), ("guidance",))
        try:
            # a rule may have had a field that is gone; what the others mean is the same
            rule = Guidance.model_validate_json(metadata["guidance"], extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            what = f"guidance.{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise RunError(f"{path} holds a rule that this release does not know: {what}") from None
        steps.append(SampleStep(step, tensors["student_loss"], tensors["guide"], tensors["weight"], rule))
    return steps


def step_files(output: Path) -> Iterator[tuple[int, Path]]:
    """Steps with their files, in order."""
    names = {path: re.fullmatch(r"step-([0-9]+)", path.stem) for path in (output / FOLDER).glob("step-*.safetensors")}
    steps = {int(found[1]): path for path, found in names.items() if found and path.name == _name(int(found[1]))}
    yield from sorted(steps.items())


def difference(one: SampleRows, other: SampleRows) -> str | None:
    """What keeps the steps of two runs from being compared, in words; None where the rows are the same."""
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
            f"whether the teacher covers a token, {changed:,} of them (teacher.placement, or a teacher that reads shorter rows)"
        )
    if changed := int((_cover(one) != _cover(other)).any(axis=0).sum()):
        return f"which of the teacher's tokens cover a token, {changed:,} of them (guidance.chunks)"
    return None


def _cover(rows: SampleRows) -> Int32:
    """[3, R, S] how many teacher tokens cover a mapped one, and the first and the last of them.

    Not where they stand in the row: where losses are cached, its teacher tokens may begin one earlier.
    """
    # a row may have no teacher token
    padded_RU = np.pad(rows.teacher_RU, ((0, 0), (0, 1)), constant_values=-1)
    places = (np.where(rows.mapped_RS, place_RS, -1) for place_RS in (rows.first_RS, rows.last_RS - 1))
    ends = [np.take_along_axis(padded_RU, place_RS, axis=1) for place_RS in places]
    return np.stack([rows.last_RS - rows.first_RS, *ends])


def summary(rows: SampleRows, step: SampleStep) -> dict[str, float]:
    """Shares kept of the mapped tokens, of all and by how many teacher tokens cover one, and mean student losses in nats.

    What is of no token is absent.
    """
    mapped_RS, kept_RS = rows.mapped_RS, step.weight_RS > 0
    width_RS = np.minimum(rows.last_RS - rows.first_RS, WIDEST)
    groups = {"share_kept": mapped_RS}
    for width in range(1, WIDEST + 1):
        groups[f"share_kept_width_{width}{'_or_more' if width == WIDEST else ''}"] = mapped_RS & (width_RS == width)
    numbers = {f"samples/{name}": float(kept_RS[group].mean()) for name, group in groups.items() if group.any()}
    for name, group in (("kept", mapped_RS & kept_RS), ("dropped", mapped_RS & ~kept_RS)):
        if group.any():
            numbers[f"samples/student_loss_{name}"] = float(step.student_loss_RS[group].mean(dtype=np.float64))
    return numbers


def distributions(rows: SampleRows, step: SampleStep) -> dict[str, Float32]:
    """Of the mapped tokens: the student's losses, and where a teacher guides, guides and excesses. Finite nats alone."""
    of = {"student_loss": step.student_loss_RS, "guide": step.guide_RS, "excess": step.excess_RS}
    values = {f"samples/{name}": values_RS[rows.mapped_RS & np.isfinite(values_RS)] for name, values_RS in of.items()}
    return {name: finite for name, finite in values.items() if len(finite)}


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def _write(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Whole or not at all."""
    make_folder(path.parent)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    remove_leftovers(path)
    write_durably(path, save(contiguous, metadata | {"version": VERSION}))


def _read(path: Path, names: Collection[str], keys: Collection[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors of these names, and metadata of these keys."""
    if not path.is_file():
        raise RunError(f"{path} is missing: a run writes it with logging.samples = R, for so many rows")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"{path} is no file that a run wrote: {error}") from None
    if (version := metadata.get("version")) != VERSION:
        has = f"version {version}" if version else "no version"
        raise RunError(f"{path} has {has}, this release reads {VERSION}: read it with the release that wrote it")
    if missing := [*(set(names) - set(tensors)), *(set(keys) - set(metadata))]:
        raise RunError(f"{path} is no file that a run wrote: it has no {', '.join(sorted(missing))}")
    return tensors, metadata
