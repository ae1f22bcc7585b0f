"""Alignment and datasets, used from a separate program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

from megatron_vocagno.corpus import AlignedDataset, Tokenizer, align
from megatron_vocagno.corpus.decoding import TokenDecoder
from megatron_vocagno.errors import CorpusError
from tests.datasets import build_dataset
from tests.runs import REPOSITORY, environment

Both = tuple[Tokenizer, Tokenizer]


def corpus_of(dataset: AlignedDataset) -> list[str]:
    lines = (dataset.path.parent / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return [normalize("NFC", text) for line in lines if (text := json.loads(line)["text"])]


def test_a_dataset_returns_its_texts(dataset: AlignedDataset) -> None:
    texts = corpus_of(dataset)
    assert [dataset.text(i) for i in range(len(dataset))] == texts
    assert any(text.startswith(" ") for text in texts) and any("▁" in text for text in texts), "the corpus must have both cases"


def test_two_sentencepiece_tokenizers_lose_only_the_sign_for_a_space(scratch: Path) -> None:
    texts = ["les êtres", "👍🏽 \n", "  indented", "x", " a▁b"]
    dataset = build_dataset(scratch / "twice", texts, scratch / "mistral", scratch / "mistral")
    assert [dataset.text(i) for i in range(len(dataset))] == [*texts[:-1], " a b"]


def test_a_leading_space_is_removed_if_the_tokenizer_may_have_added_it() -> None:
    ids = np.array([0, 1], np.int32)
    texts = [TokenDecoder([b" x", b" "], prefix).text(ids) for prefix in ("never", "always", "unless_space")]
    assert texts == [" x ", "x ", "x "]


def test_aligning_a_text_gives_the_spans_that_a_build_writes(dataset: AlignedDataset, tokenizers: Both) -> None:
    shared = 0
    for i, document in enumerate(dataset):
        pair = align(dataset.text(i), *tokenizers)
        assert np.array_equal(pair.student.ids, document.student_ids[:-1])
        assert np.array_equal(pair.teacher.ids, document.teacher_ids[:-1])
        for side in ("first", "last"):
            assert np.array_equal(getattr(pair.spans.with_eos(), side), getattr(document.spans, side))
        shared += int((~pair.spans.common_boundary).sum())
    assert shared > 100


def test_an_alignment_pairs_each_token_with_its_teacher_tokens(scratch: Path) -> None:
    text = "∫ x² dx, 각각 और 👍🏽"
    pair = align(text, str(scratch / "mistral"), scratch / "smollm2")
    tokens = list(pair)
    assert b"".join(token for token, _ in tokens).decode() == text
    assert all(token in b"".join(cover) and (cover or not token) for token, cover in tokens)
    assert any(len(cover) > 1 for _, cover in tokens) and any(not cover for _, cover in tokens)
    lines = str(pair).splitlines()
    assert len(lines) == len(tokens) and lines[0].endswith("unmapped")
    assert repr(pair) == f"<Alignment of {len(tokens)} student and {len(pair.teacher.ids)} teacher tokens: {text!r}>"


def test_an_empty_text_has_an_empty_alignment(tokenizers: Both) -> None:
    pair = align("", *tokenizers)
    assert list(pair) == [] and str(pair) == "" and len(pair.spans) == 0


def test_a_missing_tokenizer_is_an_error(tokenizers: Both, scratch: Path) -> None:
    with pytest.raises(CorpusError, match="cannot open the tokenizer"):
        align("x", tokenizers[0], scratch / "nothing")


@pytest.mark.slow
def test_the_public_modules_import_only_their_requirements() -> None:
    """`corpus` imports no torch, `objective` only torch, and importing CorpusError, as every command does, imports no library."""
    program = """
import sys
from megatron_vocagno.corpus import CorpusError
print([name for name in ("numpy", "orjson", "pydantic", "tokenizers") if name in sys.modules])
from megatron_vocagno.corpus import AlignedDataset, Alignment, Spans, Tokenizer, Tokens, align, open_tokenizer
print([name for name in ("torch", "transformers", "deepspeed", "tokenizers", "gigatoken", "pyarrow") if name in sys.modules])
from megatron_vocagno.objective import guided_loss
print([name for name in ("triton", "transformers", "deepspeed") if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n[]\n[]\n"


def test_an_unknown_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'alined'"):
        from megatron_vocagno.corpus import alined  # type: ignore[attr-defined]  # noqa: F401
