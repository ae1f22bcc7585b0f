"""The teacher's losses of a dataset: a fifth pair in each shard.

    DIR/shards/NNNN/teacher_loss.{bin,idx}   float16, nats, one per teacher token; the index has the dtype uint16, because a
                                             Megatron index does not support float16
    DIR/shards/NNNN/teacher_loss.json        the shard's record: settings, hash of the ids, sha256 of the files; written last
    DIR/dataset.json                         "teacher_losses": the same for all shards, when every shard is scored

A shard is scored if its teacher_loss.json exists, its files have the recorded sizes, and its ids are those that were scored.
Losses are rounded to the nearest float16 (11 bits: 0.05 % at most). A finite loss stays finite; infinite losses and NaN stay as
they are.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_vocagno.corpus.indexed import PairWriter
from megatron_vocagno.corpus.manifest import (
    DATASET,
    FileRecord,
    LossTotals,
    Manifest,
    Record,
    Scoring,
    ShardRecord,
    TeacherLosses,
    check_size,
    hash_file,
    to_json,
    write_durably,
)
from megatron_vocagno.errors import DatasetError
from megatron_vocagno.files import beside, sync, try_lock

LOSS = "teacher_loss"
LOSS_RECORD = f"{LOSS}.json"
LOSS_FILES = (f"{LOSS}.bin", f"{LOSS}.idx", LOSS_RECORD)
TEMPORARY = re.compile(rf"(\.{LOSS}\.[0-9a-f]+)(\.bin|\.idx|\.json)?")
LARGEST = float(np.finfo(np.float16).max)


class ShardLosses(Record):
    """teacher_loss.json. ids: sha256 of the teacher.bin whose tokens were scored"""

    scoring: Scoring
    ids: str
    totals: LossTotals
    files: dict[str, FileRecord]


def rounded(losses: NDArray[np.float32]) -> NDArray[np.float16]:
    """Losses rounded to the nearest float16. A finite loss above 65,504 becomes 65,504."""
    return np.where(np.isinf(losses), losses, np.clip(losses, -LARGEST, LARGEST)).astype(np.float16)


def write_losses(
    folder: Path,
    shard: ShardRecord,
    scoring: Scoring,
    losses: NDArray[np.float16],
    lengths: NDArray[np.int64],
    forwards: LossTotals,
) -> ShardLosses:
    """Write the losses of one shard's teacher tokens, the record last. They are on the disk when this returns.

    losses    [T], the losses of all documents, concatenated
    lengths   [D], teacher tokens of each document
    forwards  the numbers of positions and padding
    """
    (folder / LOSS_RECORD).unlink(missing_ok=True)
    with _at_work(beside(folder / LOSS)) as temporary:
        with PairWriter(temporary, np.uint16) as pair:
            pair.extend(losses.view(np.uint16), lengths)
        files = {f"{LOSS}{end}": hash_file(Path(f"{temporary}{end}")) for end in (".bin", ".idx")}
        for end in (".bin", ".idx"):
            Path(f"{temporary}{end}").replace(folder / f"{LOSS}{end}")
        sync(folder)
        counted = count(losses)
        totals = counted.model_copy(update={"positions": forwards.positions, "padding": forwards.padding})
        record = ShardLosses(scoring=scoring, ids=_ids_of(shard), totals=totals, files=files)
        written = Path(f"{temporary}.json")
        with written.open("xb") as stream:
            stream.write(to_json(record))
            stream.flush()
            os.fsync(stream.fileno())
        written.replace(folder / LOSS_RECORD)
        sync(folder)
    return record


def link_losses(source: Path, folder: Path, shard: ShardRecord) -> ShardLosses:
    """Give a shard the losses of another shard with the same teacher tokens: hard links, or copies where there are none.

    They are on the disk when this returns. The other shard's files must be those of its record.
    """
    (folder / LOSS_RECORD).unlink(missing_ok=True)
    with _at_work(beside(folder / LOSS)) as temporary:
        for name in LOSS_FILES:  # the record is the last one
            written = Path(f"{temporary}{name.removeprefix(LOSS)}")
            try:
                written.hardlink_to(source / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source / name, written)
                with written.open("rb") as stream:
                    os.fsync(stream.fileno())
            written.replace(folder / name)
        sync(folder)
    found = read_losses(folder, shard)
    assert found is not None, f"{source / LOSS_RECORD} does not describe its folder"
    return found


@contextmanager
def _at_work(temporary: Path) -> Iterator[Path]:
    """A prefix of temporary files. A locked file of this name shows that their writer is alive. All are removed at the end.

    A shard may belong to several datasets, each with a lock. A process that tidies one dataset may therefore find temporary files
    of a process that works on another.
    """
    with temporary.open("xb") as marker:
        try_lock(marker)
        try:
            yield temporary
        finally:
            for leftover in temporary.parent.glob(f"{temporary.name}*"):
                leftover.unlink(missing_ok=True)


def count(losses: NDArray[np.float16]) -> LossTotals:
    """The totals of losses [T], without positions and padding."""
    finite = losses[np.isfinite(losses)]
    nan = int(np.isnan(losses).sum())
    return LossTotals(
        tokens=len(losses), nan=nan, infinite=len(losses) - len(finite) - nan, nats=float(finite.sum(dtype=np.float64))
    )


def read_losses(folder: Path, shard: ShardRecord) -> ShardLosses | None:
    """The record of a scored shard; None if it is not scored, its files are incomplete, or other ids were scored."""
    try:
        found = ShardLosses.model_validate_json((folder / LOSS_RECORD).read_bytes())
        for name, record in found.files.items():
            check_size(folder / name, record)
    except (FileNotFoundError, ValidationError, DatasetError):
        return None
    return found if found.ids == _ids_of(shard) else None


def gather(root: Path, shards: Sequence[ShardRecord]) -> TeacherLosses | None:
    """The record for dataset.json; None unless all shards with documents are scored, with the same settings."""
    files: list[dict[str, FileRecord]] = []
    totals, scoring = LossTotals(), None
    for shard in shards:
        if not shard.totals.documents:
            files.append({})
            continue
        found = read_losses(root / shard.path, shard)
        if found is None or found.scoring != (scoring or found.scoring):
            return None
        scoring = scoring or found.scoring
        totals += found.totals
        files.append(found.files | {LOSS_RECORD: hash_file(root / shard.path / LOSS_RECORD)})
    return None if scoring is None else TeacherLosses(scoring=scoring, totals=totals, shards=tuple(files))


def unscored(root: Path, manifest: Manifest) -> list[str]:
    """Paths of the shards that are not scored."""
    with_text = (shard for shard in manifest.shards if shard.totals.documents)
    return [shard.path for shard in with_text if read_losses(root / shard.path, shard) is None]


def record_losses(root: Path, manifest: Manifest, losses: TeacherLosses | None) -> Manifest:
    """Write the losses into dataset.json, or remove them from it. Returns the new manifest."""
    data = manifest.model_copy(update={"teacher_losses": losses}).sealed()
    if data != (root / DATASET).read_bytes():
        write_durably(root / DATASET, data)
    return Manifest.model_validate_json(data)


def require_unchanged(root: Path, manifest: Manifest) -> None:
    """Raises DatasetError if a shard was scored again as part of another dataset, so that dataset.json does not match."""
    assert manifest.teacher_losses is not None
    for shard, files in zip(manifest.shards, manifest.teacher_losses.shards, strict=True):
        recorded, file = files.get(LOSS_RECORD), root / shard.path / LOSS_RECORD
        if recorded is not None and hash_file(file) != recorded:
            raise DatasetError(
                f"{file} is not what {root / DATASET} records: was the shard scored again, as part of another dataset?"
            )


def _ids_of(shard: ShardRecord) -> str:
    return shard.files["teacher.bin"].sha256


def remove_leftover_losses(root: Path, manifest: Manifest) -> None:
    """Remove temporary files of killed processes from the folders of shards. Files of running processes are kept."""
    for shard in manifest.shards:
        for leftover in (root / shard.path).glob(f".{LOSS}.*"):
            if (found := TEMPORARY.fullmatch(leftover.name)) and not _is_at_work(leftover.with_name(found[1])):
                leftover.unlink(missing_ok=True)


def _is_at_work(marker: Path) -> bool:
    try:
        with marker.open("r+b") as stream:
            return try_lock(stream) == "held"
    except FileNotFoundError:
        return False
