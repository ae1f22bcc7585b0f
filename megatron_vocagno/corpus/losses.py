"""The teacher's losses of a dataset, scored once: a fifth pair in each shard.

    DIR/shards/NNNN/teacher_loss.{bin,idx}   float16, nats, one for each teacher token; stored as uint16, whose bits they are:
                                             a Megatron index knows no float16
    DIR/shards/NNNN/teacher_loss.json        the shard's record: how, from which ids, the files' sha256; written last
    DIR/dataset.json                         "teacher_losses": the same of all shards, once every one is scored

A shard is scored exactly when its teacher_loss.json is there, its files have the recorded sizes, and its ids are those that
were scored. Losses are rounded to the nearest float16 (11 bits: 0.05 % at most); a finite one stays finite, infinite and NaN
stay what they are.
"""

from __future__ import annotations

import re
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
ON_ITS_WAY = re.compile(rf"(\.{LOSS}\.[0-9a-f]+)(\.bin|\.idx)?")
LARGEST = float(np.finfo(np.float16).max)


class ShardLosses(Record):
    """teacher_loss.json. ids: sha256 of the teacher.bin whose tokens were scored."""

    scoring: Scoring
    ids: str
    totals: LossTotals
    files: dict[str, FileRecord]


def rounded(losses: NDArray[np.float32]) -> NDArray[np.float16]:
    """To the nearest float16; what is finite and beyond 65,504 becomes 65,504."""
    return np.where(np.isinf(losses), losses, np.clip(losses, -LARGEST, LARGEST)).astype(np.float16)


def write_losses(
    folder: Path,
    shard: ShardRecord,
    scoring: Scoring,
    losses: NDArray[np.float16],
    lengths: NDArray[np.int64],
    forwards: LossTotals,
) -> ShardLosses:
    """The losses of one shard's teacher tokens, on the disk and in their place, the record last.

    losses    [T], those of the documents end to end
    lengths   [D], teacher tokens of each document
    forwards  what is known besides the losses: positions and padding
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
    write_durably(folder / LOSS_RECORD, to_json(record))
    return record


@contextmanager
def _at_work(temporary: Path) -> Iterator[Path]:
    """A prefix of files on their way. A locked file of that name says that their writer lives; all are gone afterwards.

    A shard may belong to several datasets, with a lock each: who tidies up in one may meet a writer of another.
    """
    with temporary.open("xb") as sign:
        try_lock(sign)
        try:
            yield temporary
        finally:
            for leftover in temporary.parent.glob(f"{temporary.name}*"):
                leftover.unlink(missing_ok=True)


def count(losses: NDArray[np.float16]) -> LossTotals:
    """Of losses [T]; nothing is known of the forwards that gave them."""
    finite = losses[np.isfinite(losses)]
    nan = int(np.isnan(losses).sum())
    return LossTotals(
        tokens=len(losses), nan=nan, infinite=len(losses) - len(finite) - nan, nats=float(finite.sum(dtype=np.float64))
    )


def read_losses(folder: Path, shard: ShardRecord) -> ShardLosses | None:
    """The record of a scored shard; None where it is not scored, where its files are not whole, or other ids were scored."""
    try:
        found = ShardLosses.model_validate_json((folder / LOSS_RECORD).read_bytes())
        for name, record in found.files.items():
            check_size(folder / name, record)
    except (FileNotFoundError, ValidationError, DatasetError):
        return None
    return found if found.ids == _ids_of(shard) else None


def gather(root: Path, shards: Sequence[ShardRecord]) -> TeacherLosses | None:
    """What dataset.json records of them; None unless every shard that has documents is scored, and all in one way."""
    files: list[dict[str, FileRecord]] = []
    totals, scoring = LossTotals(), None
    for shard in shards:
        if not shard.totals.documents:
            files.append({})
            continue
        found = read_losses(root / shard.path, shard)
        if found is None or found.scoring != (scoring or found.scoring):
            return None
        scoring = found.scoring
        totals += found.totals
        files.append(found.files | {LOSS_RECORD: hash_file(root / shard.path / LOSS_RECORD)})
    return None if scoring is None else TeacherLosses(scoring=scoring, totals=totals, shards=tuple(files))


def unscored(root: Path, manifest: Manifest) -> list[str]:
    """Paths of the shards that are not scored."""
    with_text = (shard for shard in manifest.shards if shard.totals.documents)
    return [shard.path for shard in with_text if read_losses(root / shard.path, shard) is None]


def record_losses(root: Path, manifest: Manifest, losses: TeacherLosses | None) -> Manifest:
    """Writes them into dataset.json, or takes them out of it."""
    data = manifest.model_copy(update={"teacher_losses": losses}).sealed()
    if data != (root / DATASET).read_bytes():
        write_durably(root / DATASET, data)
    return Manifest.model_validate_json(data)


def require_whole(root: Path, manifest: Manifest) -> None:
    """Raises DatasetError where a shard's record is not the one that dataset.json has recorded: it was scored anew elsewhere."""
    assert manifest.teacher_losses is not None
    for shard, files in zip(manifest.shards, manifest.teacher_losses.shards, strict=True):
        recorded, file = files.get(LOSS_RECORD), root / shard.path / LOSS_RECORD
        if recorded is not None and hash_file(file) != recorded:
            raise DatasetError(
                f"{file} is not what {root / DATASET} records: was the shard scored anew, as part of another dataset?"
            )


def _ids_of(shard: ShardRecord) -> str:
    return shard.files["teacher.bin"].sha256


def tidy(root: Path, manifest: Manifest) -> None:
    """Removes what killed processes left in the folders of shards, and nothing of those that are at work."""
    for shard in manifest.shards:
        for leftover in (root / shard.path).glob(f".{LOSS}.*"):
            if (found := ON_ITS_WAY.fullmatch(leftover.name)) and not _is_at_work(leftover.with_name(found[1])):
                leftover.unlink(missing_ok=True)


def _is_at_work(sign: Path) -> bool:
    try:
        with sign.open("r+b") as stream:
            return try_lock(stream) == "held"
    except FileNotFoundError:
        return False
