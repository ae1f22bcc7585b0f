"""Losses of another dataset. A teacher's losses belong to its own tokens of a text, whichever student they are compared with.

A shard with the same teacher tokens as a scored shard gets the files of that shard. In other shards, each document with the same
teacher tokens as a scored document gets its losses. A corpus that is aligned for another student therefore needs no teacher.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.losses import require_unchanged
from megatron_vocagno.corpus.manifest import Scoring, ShardRecord, hash_file
from megatron_vocagno.errors import CorpusError, DatasetError


class ScoredDocuments:
    """The losses of a scored dataset, by the teacher's tokens of its documents."""

    def __init__(self, path: Path) -> None:
        """Raises DatasetError, and CorpusError if the dataset has no losses."""
        self.data = AlignedDataset.open(path)
        if self.data.scoring is None:
            raise CorpusError(f"--reuse {path}: this dataset has no losses of its teacher, or not yet of all its shards")
        require_unchanged(self.data.path, self.data.manifest)

    @property
    def scoring(self) -> Scoring:
        assert self.data.scoring is not None
        return self.data.scoring

    def require_same_tokenizer(self, data: AlignedDataset) -> None:
        """Raises CorpusError if the teacher's ids of `data` are those of another tokenizer."""
        ours, theirs = self.data.manifest.tokenizer("teacher"), data.manifest.tokenizer("teacher")
        if ours.fingerprint != theirs.fingerprint:
            raise CorpusError(
                f"{data.path} and --reuse {self.data.path} have different teacher tokenizers ({theirs.vocab_size:,} ids, "
                f"{theirs.fingerprint[:12]}; {ours.vocab_size:,} ids, {ours.fingerprint[:12]}): are both aligned for one teacher?"
            )

    def shard_like(self, record: ShardRecord) -> Path | None:
        """The folder of a scored shard with the same teacher tokens in the same documents, or None."""
        found = self._shards.get((record.files["teacher.bin"].sha256, record.files["teacher.idx"].sha256))
        if found is None:
            return None
        self._require_intact(found)
        return self.data.path / found.path

    def _require_intact(self, shard: ShardRecord) -> None:
        """Raises DatasetError if the losses of a shard are not those that were recorded."""
        assert self.data.manifest.teacher_losses is not None
        recorded = self.data.manifest.teacher_losses.shards[self.data.manifest.shards.index(shard)]
        for name, file in recorded.items():
            path = self.data.path / shard.path / name
            if hash_file(path) != file:
                raise DatasetError(f"--reuse {self.data.path}: {path} is not what dataset.json records: the file is damaged")

    def losses(self, ids: NDArray[np.integer], lengths: NDArray[np.int32]) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """The losses of the documents that are known.

        ids      [T], documents end to end
        lengths  [D], tokens of each document
        returns  float16 [T], NaN in unknown documents; bool [D], whether a document is known
        """
        losses, known = np.full(len(ids), np.nan, np.float16), np.zeros(len(lengths), np.bool_)
        hashes, documents = self._index
        stop = 0
        for i, length in enumerate(lengths.tolist()):
            start, stop = stop, stop + length
            own = ids[start:stop]
            key = np.uint64(_hash(own))
            place = int(np.searchsorted(hashes, key))
            # several documents may have one hash
            while place < len(hashes) and hashes[place] == key:
                document = int(documents[place])
                if np.array_equal(self.data.teacher(document), own):
                    losses[start:stop] = self.data.teacher_losses(document).astype(np.float16)
                    known[i] = True
                    break
                place += 1
        return losses, known

    @cached_property
    def _shards(self) -> dict[tuple[str, str], ShardRecord]:
        shards = [shard for shard in self.data.manifest.shards if shard.totals.documents]
        return {(shard.files["teacher.bin"].sha256, shard.files["teacher.idx"].sha256): shard for shard in shards}

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes, ascending, and the documents that have them. 16 bytes per document."""
        for shard in self._shards.values():
            self._require_intact(shard)
        hashes = np.array([_hash(self.data.teacher(document)) for document in range(len(self.data))], np.uint64)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def _hash(ids: NDArray[np.integer]) -> int:
    """64 bits. The type of the ids depends on the vocabulary, so all are hashed as int32."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def open_scored(path: Path) -> ScoredDocuments:
    return ScoredDocuments(path)
