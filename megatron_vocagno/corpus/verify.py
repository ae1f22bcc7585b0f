"""Read a complete dataset and report all changes since it was written.

Hashes find every changed bit, and a walk finds missing and unknown files. The structure is checked too, in case it was written
wrongly: ids within the vocabulary, EOS last, codes that lead from anchor to anchor and to the teacher's last token.

    complaints = verify_frame(root, manifest)                      dataset.json, tokenizers, unknown files
    for check in shard_checks(root, manifest):
        complaints += verify_shard(check)                          one shard; a check can be pickled for workers
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.indexed import check_pointers, map_numbers, read_lengths
from megatron_vocagno.corpus.losses import LOSS, LOSS_FILES, count, read_losses
from megatron_vocagno.corpus.manifest import (
    BUILD,
    DATASET,
    IDS,
    PAIRS,
    SIDES,
    FileRecord,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    Totals,
    check_size,
    hash_file,
    read_manifest,
)
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, WIDEST
from megatron_vocagno.errors import CorpusError, DatasetError

BLOCK = 1 << 20  # student tokens that are checked at once: they fit the cache of a core

Numbers = NDArray[Any]


def verify(root: Path, on_shard: Callable[[ShardRecord], object] = lambda shard: None) -> None:
    """Verify a dataset. Raises DatasetError that names every changed file. on_shard: called after each shard"""
    manifest = read_manifest(root)
    complaints = verify_frame(root, manifest)
    for check in shard_checks(root, manifest):
        complaints += verify_shard(check)
        on_shard(check.record)
    if complaints:
        raise DatasetError("\n".join(complaints))


def verify_frame(root: Path, manifest: Manifest) -> list[str]:
    """The complaints about everything except the shards' files."""
    complaints = []
    for side in SIDES:
        complaints += _changed_files(root / "tokenizers" / side, manifest.tokenizer(side).files)
    complaints += [
        f"{path} does not belong to the dataset: left by a killed worker, or put there since?"
        for path in unknown_files(root, manifest)
    ]
    if sum((shard.totals for shard in manifest.shards), Totals()) != manifest.totals:
        complaints.append(f"{root / DATASET}: its totals are not the sum of its shards'")
    return complaints


def unknown_files(root: Path, manifest: Manifest) -> list[Path]:
    """Files in the folders of the dataset and its shards that dataset.json does not name, and empty folders.

    Folders of other datasets inside are skipped. Losses that dataset.json does not name belong to an unfinished scoring and are
    not reported.
    """
    named = {root: {DATASET}} | {root / "tokenizers" / side: set(manifest.tokenizer(side).files) for side in SIDES}
    named |= {root / shard.path: {*shard.files, *LOSS_FILES} for shard in manifest.shards}
    named = {folder.resolve(): names for folder, names in named.items()}
    found = set()
    for top in named:
        for where, folders, files in os.walk(top):
            folder = Path(where)
            if folder == root.resolve() and BUILD in folders:
                folders.remove(BUILD)
            if folder not in named and DATASET in files:
                folders.clear()
                continue
            found |= {folder / name for name in set(files) - named.get(folder, set())}
            if not folders and not files and folder not in named:
                found.add(folder)
    return sorted(found)


@dataclass(frozen=True)
class ShardCheck:
    """The arguments of verify_shard."""

    folder: Path
    record: ShardRecord
    student: TokenizerRecord
    teacher: TokenizerRecord
    pairs: tuple[str, ...]
    losses: dict[str, FileRecord]


def shard_checks(root: Path, manifest: Manifest) -> list[ShardCheck]:
    """One check per shard, for verify_shard on any engine."""
    losses = manifest.teacher_losses.shards if manifest.teacher_losses is not None else ({},) * len(manifest.shards)
    return [
        ShardCheck(root / record.path, record, manifest.student, manifest.teacher, manifest.pairs, files)
        for record, files in zip(manifest.shards, losses, strict=True)
    ]


def verify_shard(check: ShardCheck) -> list[str]:
    """The complaints about a shard, one line each."""
    complaints = _changed_files(check.folder, check.record.files | check.losses)
    if complaints or not check.record.totals.documents:
        return complaints
    try:
        _check_structure(check)
    except CorpusError as error:
        return [str(error)]
    return []


def _changed_files(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    complaints = []
    for name, record in files.items():
        try:
            check_size(folder / name, record)
            actual = hash_file(folder / name).sha256
        except (DatasetError, OSError) as error:
            complaints.append(str(error))
            continue
        if actual != record.sha256:
            complaints.append(f"{folder / name}: sha256 {actual}, recorded {record.sha256}: changed since it was written")
    return complaints


# ---- structure


class _Pair:
    """One pair of one shard. starts: [n + 1], the index of the first number of each document, and the number of numbers"""

    def __init__(self, prefix: Path) -> None:
        check_pointers(prefix)
        self.prefix = prefix
        dtype, self.lengths = read_lengths(prefix)
        self.starts = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self.starts[1:])
        self.flat = map_numbers(f"{prefix}.bin", dtype, int(self.starts[-1]), mmap.MADV_SEQUENTIAL)

    def of(self, first: int, stop: int) -> Numbers:
        """The numbers of the documents [first, stop)."""
        return self.flat[self.starts[first] : self.starts[stop]]

    def refuse(self, bad: NDArray[np.bool_], what: str, first: int = 0) -> None:
        """Raises DatasetError for the first bad document. first: the index of the document of bad[0]"""
        if bad.any():
            raise DatasetError(f"{self.prefix}.bin: document {first + int(np.argmax(bad)):,} {what}")


def _check_structure(check: ShardCheck) -> None:
    """Raises CorpusError for a shard that was written wrongly."""
    pairs = {name: _Pair(check.folder / name) for name in check.pairs}
    student, teacher, codes, anchors = (pairs[name] for name in PAIRS)
    totals = check.record.totals
    for pair in pairs.values():
        if len(pair.lengths) != totals.documents:
            raise DatasetError(f"{pair.prefix}.idx: {len(pair.lengths):,} documents, recorded are {totals.documents:,}")
    _check_ids(student, check.student, "student")
    _check_ids(teacher, check.teacher, "teacher")
    codes.refuse(codes.lengths != student.lengths, "does not have one code per student token")
    first = unmapped = 0
    while first < totals.documents:
        stop = max(first + 1, int(np.searchsorted(codes.starts, codes.starts[first] + BLOCK, side="right")) - 1)
        unmapped += _check_spans(codes, anchors, teacher, first, stop)
        first = stop
    for name, counted, recorded in (
        ("student tokens", int(student.starts[-1]), totals.student_tokens),
        ("teacher tokens", int(teacher.starts[-1]), totals.teacher_tokens),
        ("unmapped tokens", unmapped, totals.student_tokens - totals.mapped_tokens),
    ):
        if counted != recorded:
            raise DatasetError(f"{check.folder}: {counted:,} {name}, recorded are {recorded:,}")
    if IDS in pairs:
        _check_text(pairs[IDS])
    if check.losses:
        _check_losses(check, teacher)


def _check_losses(check: ShardCheck, teacher: _Pair) -> None:
    losses, recorded = _Pair(check.folder / LOSS), read_losses(check.folder, check.record)
    if not np.array_equal(losses.lengths, teacher.lengths):
        raise DatasetError(f"{losses.prefix}.idx: the lengths are not those of the teacher tokens")
    counted = count(losses.flat.view(np.float16))
    if recorded is None or (counted.tokens, counted.nan, counted.infinite) != (
        recorded.totals.tokens,
        recorded.totals.nan,
        recorded.totals.infinite,
    ):
        raise DatasetError(
            f"{losses.prefix}.bin: {counted.nan:,} NaN and {counted.infinite:,} infinite losses of {counted.tokens:,}, "
            f"recorded are {recorded and recorded.totals}"
        )


def _check_ids(pair: _Pair, tokenizer: TokenizerRecord, side: str) -> None:
    pair.refuse(pair.lengths < 1, "is empty; it must have at least EOS")
    pair.refuse(pair.flat[pair.starts[1:] - 1] != tokenizer.eos_id, f"does not end with the {side}'s EOS, {tokenizer.eos_id}")
    lowest, highest = int(pair.flat.min()), int(pair.flat.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise DatasetError(
            f"{pair.prefix}.bin has id {highest} or {lowest}, the {side}'s vocabulary has {tokenizer.vocab_size:,}"
        )


def _check_spans(codes: _Pair, anchors: _Pair, teacher: _Pair, first: int, stop: int) -> int:
    """Check that the codes of the documents [first, stop) lead to every anchor and to the teacher's EOS.

    Returns the number of unmapped tokens.
    """
    code = codes.of(first, stop)
    begins = codes.starts[first : stop + 1] - codes.starts[first]
    codes.refuse(code[begins[:-1]] & 1 == 1, "starts with a token that shares a teacher token with a previous token", first)
    codes.refuse(code[begins[1:] - 1] != 0, "ends with a token that is mapped, EOS is not", first)
    if len(where := np.flatnonzero(code == 1)):
        codes.refuse(begins[1:] > where[0], "has a token without a span that shares it", first)

    # the side list of each document: its anchors, then its escapes in pairs
    side = anchors.of(first, stop)
    n_side, n_anchors = anchors.lengths[first:stop], -(-codes.lengths[first:stop] // ANCHOR_EVERY)
    anchors.refuse((n_side < n_anchors) | ((n_side - n_anchors) % 2 == 1), "does not have an anchor every 4,096 tokens", first)
    is_anchor = _within(n_side) < np.repeat(n_anchors, n_side)
    anchor, escapes = side[is_anchor].astype(np.int64), side[~is_anchor].reshape(-1, 2)
    n_escapes = (n_side - n_anchors) // 2
    at = escapes[:, 0] + np.repeat(begins[:-1], n_escapes)
    escaped = np.flatnonzero(code == ESCAPE)
    if not np.array_equal(at, escaped) or np.any(escapes[:, 1] >> 1 <= WIDEST):
        raise DatasetError(
            f"{codes.prefix}.bin: the escapes of documents {first:,} to {stop - 1:,} are not those of {anchors.prefix}.bin"
        )

    # from anchor to anchor, and from the last one to EOS
    segments = np.repeat(begins[:-1], n_anchors) + _within(n_anchors) * ANCHOR_EVERY
    # int32 is twice as fast as int64, and the sum of 4,096 one-byte codes fits
    steps = np.add.reduceat((code >> 1) - (code & 1), segments, dtype=np.int32).astype(np.int64)
    wide = escapes[:, 1].astype(np.int64)
    beyond = (wide >> 1) - (wide & 1) - ((ESCAPE >> 1) - (ESCAPE & 1))
    np.add.at(steps, np.searchsorted(segments, at, side="right") - 1, beyond)
    is_last = np.cumsum(n_anchors) - 1
    leads_to = np.roll(anchor, -1)
    leads_to[is_last] = teacher.lengths[first:stop] - 1
    starts = anchor[is_last - n_anchors + 1]
    codes.refuse((starts != 0) & (starts != 1), f"starts at neither teacher token 0 nor 1 by {anchors.prefix}.bin", first)
    wrong = np.logical_or.reduceat(anchor + steps != leads_to, is_last - n_anchors + 1)
    codes.refuse(wrong, f"does not lead to the anchors of {anchors.prefix}.bin and to the teacher's last token", first)
    return int(np.count_nonzero(code == 0))


def _within(lengths: Numbers) -> NDArray[np.int64]:
    """0 … n - 1 for each length n, concatenated."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _check_text(ids: _Pair) -> None:
    for i in range(len(ids.lengths)):
        try:
            ids.of(i, i + 1).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{ids.prefix}.bin: document {i:,}: its id is not UTF-8: {error}") from None
