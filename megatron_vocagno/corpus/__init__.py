"""Text -> files: an aligned dataset on disk. numpy only, no torch.

In the order in which data passes. What is read:

- `places`       a path or URL -> something to open
- `inputs`       files, folders, globs -> pieces of files; `streams`, `parquet`  their bytes, their rows;
                 `foreign`  what is no input
- `documents`    a piece -> documents, and records that are none

What is made of a text:

- `tokens`       a text -> `Tokens`: ids and the UTF-8 byte at which each token ends
- `plain_text`   a tokenizer.json -> how it reads a text, without its control tokens
- `encoders`     the libraries that give the ids; `sentencepiece_model`  a SentencePiece model -> tokenizer.json
- `tokenizer_files`  which files a tokenizer has, and which token ends a document
- `identity`     whether two tokenizers are one, and whether one reads texts as its own library does
- `front`        the ids that a model's tokenizer puts in front of a text: BOS
- `spans`        two `Tokens` of one text -> `Spans`: the teacher tokens that cover each student token; the one-byte codec
- `alignment`    `align`: one text and two tokenizers -> both sides' tokens and the spans, printable
- `aligner`      the same for a batch of texts at once, by arrays; `aligner_numba`  compiled
- `long_texts`   a text of many megabytes, in parts

What is written:

- `indexed`      Megatron `.bin`/`.idx` pairs: write, read
- `shard_writer` documents -> the pairs of one shard
- `shards`       `make_shard`, the one idempotent function that every engine runs
- `manifest`     dataset.json: its records, `create`
- `dataset`      `AlignedDataset`: open, read, merge; `verify`  read everything and find what changed
- `decoding`     its token ids -> text
- `losses`       the losses of a teacher that has scored it

How it is run:

- `plan`         inputs -> which pieces make which shard
- `workers`      jobs in processes of this machine; `ray_engine`  on a Ray cluster
- `build`        plan, engine, dataset.json; locks, slices for job arrays

`docs/reference.md` describes the files byte by byte.

The names below are for code outside of this project, as docs/reference.md shows them; inside, modules are named in full.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_vocagno.errors import CorpusError

if TYPE_CHECKING:
    from megatron_vocagno.corpus.alignment import Alignment, align
    from megatron_vocagno.corpus.dataset import AlignedDataset
    from megatron_vocagno.corpus.spans import Spans
    from megatron_vocagno.corpus.tokens import Tokenizer, Tokens, open_tokenizer

__all__ = ["AlignedDataset", "Alignment", "CorpusError", "Spans", "Tokenizer", "Tokens", "align", "open_tokenizer"]


if not TYPE_CHECKING:  # a type checker would let any name pass
    _HOMES = {
        "AlignedDataset": "dataset",
        "Alignment": "alignment",
        "Spans": "spans",
        "Tokenizer": "tokens",
        "Tokens": "tokens",
        "align": "alignment",
        "open_tokenizer": "tokens",
    }

    def __getattr__(name: str) -> object:
        """The names in __all__ when they are asked for: commands start without them, and all modules here import CorpusError."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
