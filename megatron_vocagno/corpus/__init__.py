"""An aligned dataset: tokenizers, alignment, files. It needs numpy, not torch.

Tokenizers:

- `tokens`       a text -> `Tokens`: ids and the UTF-8 byte at which each token ends
- `encoders`     the libraries that compute the ids
- `plain_text`   a tokenizer.json -> how it reads a text, without its control tokens
- `sentencepiece_model`  a SentencePiece model -> tokenizer.json
- `tokenizer_files`  the files of a tokenizer, and the token that ends a document
- `front`        the ids that a model's tokenizer puts in front of a text (BOS)
- `identity`     compares two tokenizers, or a tokenizer with its own library
- `decoding`     token ids -> text

Alignment:

- `spans`        two `Tokens` of one text -> `Spans`: the teacher tokens that cover each student token; the one-byte codec
- `alignment`    `align`: one text and two tokenizers -> both sides' tokens and the spans, printable

Files:

- `places`       a path or URL -> a path object that can be opened
- `indexed`      Megatron `.bin`/`.idx` pairs
- `manifest`     dataset.json
- `create`       finished shards -> a dataset
- `losses`       a teacher's losses of the dataset's tokens
- `dataset`      `AlignedDataset`: open, read, merge
- `verify`       reads a dataset completely and finds changes

docs/reference.md describes the files byte by byte. Code outside of this project should use the names in `__all__`; code inside
imports from the modules.
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
        """Import a name of __all__ on first use, so that commands start quickly."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
