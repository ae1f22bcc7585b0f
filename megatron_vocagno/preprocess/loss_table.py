"""The losses of a scored dataset as parquet files, for other programs: filtering, data selection, perplexity.

    OUT/losses/0000.parquet     one file per shard, one row per document

    id      string, the document's id in the input; empty if no ids were read
    ids     list of int32, the teacher's tokens, the end-of-text token last
    ends    list of int32, the byte of the text at which each token ends. The text is in UTF-8 and NFC, and for a SentencePiece
            tokenizer a character U+2581 in it counts as a space, as in AlignedDataset.text. A tokenizer that puts a space before
            a text unless it has one hides whether it did: a space at the start of the text is then not counted
    losses  list of float16, nats: the loss of each token after all tokens before it

Import this module only to write such files: pyarrow takes 0.2 s and 50 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.plain_text import plain_text
from megatron_vocagno.corpus.tokenizer_files import read_json
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.files import replacing

DOCUMENTS_A_BATCH = 1024
SCHEMA = pa.schema(
    {"id": pa.string(), "ids": pa.list_(pa.int32()), "ends": pa.list_(pa.int32()), "losses": pa.list_(pa.float16())}
)


def write_tables(data: AlignedDataset, folder: Path) -> list[Path]:
    """Write a file for each shard with documents, and remove other tables in the folder.

    Raises CorpusError if the dataset is not scored, and OSError.
    """
    if data.scoring is None:
        raise CorpusError(f"{data.path} has no losses of its teacher, or not yet of all its shards")
    folder.mkdir(parents=True, exist_ok=True)
    written, first = [], 0
    for shard in data.manifest.shards:
        if not shard.totals.documents:
            continue
        stop = first + shard.totals.documents
        file = folder / f"{Path(shard.path).name}.parquet"
        with replacing(file) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for batch in _batches(data, first, stop):
                writer.write_batch(batch)
        written.append(file)
        first = stop
    for file in folder.glob("*.parquet"):
        if file not in written:  # of an earlier set of texts
            file.unlink()
    return written


def _batches(data: AlignedDataset, first: int, stop: int) -> Iterator[pa.RecordBatch]:
    # a space that the tokenizer puts before a text is not in the text
    prefix = plain_text(read_json(data.teacher_tokenizer.path / "tokenizer.json"), set()).prefix
    for begin in range(first, stop, DOCUMENTS_A_BATCH):
        documents = range(begin, min(begin + DOCUMENTS_A_BATCH, stop))
        ids = [data.teacher(document) for document in documents]
        ends = [
            _ends(one, data.teacher_byte_lengths, prefix != "never", data.text(i)) for i, one in zip(documents, ids, strict=True)
        ]
        losses = [data.teacher_losses(document).astype(np.float16) for document in documents]
        columns = [pa.array([data.id(document) for document in documents], pa.string())]
        columns += [_lists(ids, pa.int32()), _lists(ends, pa.int32()), _lists(losses, pa.float16())]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _ends(ids: NDArray[np.int32], byte_lengths: NDArray[np.int32], prefixed: bool, text: str) -> NDArray[np.int32]:
    """[N] the byte of the text at which each token ends."""
    ends = byte_lengths[ids].cumsum()
    added = int(ends[-1]) - len(text.encode()) if prefixed and len(ends) else 0
    found: NDArray[np.int32] = np.maximum(ends - added, 0).astype(np.int32)
    return found


def _lists(values: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values), kind))
