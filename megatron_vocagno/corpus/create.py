"""Finished shards -> a dataset: write its tokenizers and, last, dataset.json."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_vocagno.corpus.manifest import (
    CODEC,
    DATASET,
    FORMAT,
    UNSEALED,
    FileRecord,
    Manifest,
    ShardRecord,
    TeacherLosses,
    TokenizerRecord,
    Totals,
    make_folder,
    write_durably,
)
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.corpus.tokens import Tokenizer
from megatron_vocagno.errors import DatasetError


def create(
    out: Place,
    student: Tokenizer,
    teacher: Tokenizer,
    shards: Sequence[ShardRecord],
    nfc: bool,
    id_key: str | None = None,
    teacher_losses: TeacherLosses | None = None,
) -> None:
    """Write the tokenizers and, last, dataset.json. Raises DatasetError if the shards contain no document."""
    totals = sum((shard.totals for shard in shards), Totals())
    if not totals.documents:
        if not totals.empty_documents + totals.bad_lines + totals.mismatched_documents:
            raise DatasetError("no document was read: the input files are empty")
        raise DatasetError(
            f"no document is left: {totals.empty_documents:,} were empty, {totals.bad_lines:,} lines were bad, "
            f"the tokens of {totals.mismatched_documents:,} did not cover their text. Is --text-key the key of the text?"
        )
    manifest = Manifest(
        format=FORMAT,
        sha256=UNSEALED,
        codec=CODEC,
        nfc=nfc,
        id_key=id_key,
        student=_write_tokenizer(out / "tokenizers" / "student", student),
        teacher=_write_tokenizer(out / "tokenizers" / "teacher", teacher),
        totals=totals,
        shards=tuple(shards),
        teacher_losses=teacher_losses,
    )
    write_durably(out / DATASET, manifest.sealed())


def _write_tokenizer(folder: Place, tokenizer: Tokenizer) -> TokenizerRecord:
    with TemporaryDirectory() as temporary:
        tokenizer.save(Path(temporary))
        contents = {file.name: file.read_bytes() for file in sorted(Path(temporary).iterdir())}
    table = io.BytesIO()
    np.save(table, tokenizer.byte_lengths, allow_pickle=False)
    contents["byte_lengths.npy"] = table.getvalue()
    make_folder(folder)
    for name, data in contents.items():
        write_durably(folder / name, data)
    return TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos_token=tokenizer.eos_token,
        files={n: FileRecord(size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in sorted(contents.items())},
    )
