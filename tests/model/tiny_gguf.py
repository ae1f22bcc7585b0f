"""Tiny random GGUF files: a two-layer Llama, or another of its shape, with a tokenizer of some forty tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_vocagno.compat import gguf_remedy

VOCAB = [*"abcdefghijklmnopqrstuvwxyz0123456789.,", "Ġ", "Ċ", "th", "he", "<|end|>"]
PIECES = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,", "th"]
"""Of a SentencePiece vocabulary, as many as VOCAB has."""
HIDDEN, HEADS, LAYERS, INNER = 32, 2, 2, 64


def skip_if_unreadable() -> None:
    """Skip the test if the installed packages do not read GGUF files, for example transformers before 5.19."""
    if remedy := gguf_remedy():
        pytest.skip(f"reading GGUF files needs {remedy}")


def write_gguf(
    path: Path,
    rule: str | None = "gpt-2",
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    drop: str | None = None,
    width: int = HIDDEN // HEADS,
    pieces: bool = False,
) -> Path:
    """Weights of the hidden layers in 8 bits.

    keys     besides the usual ones, or instead of them: whole names; None for one that is to be left out
    tensors  besides the usual ones; drop: part of the names of those that are to be left out
    width    of a head; pieces: a SentencePiece vocabulary instead of a byte-level one
    """
    skip_if_unreadable()
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**_usual(architecture, rule, pieces), **(keys or {})}.items():
        if value is not None:
            _add(writer, name, value)
    generator = np.random.default_rng(0)
    inner = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    heads = {**dict.fromkeys(("attn_q", "attn_k", "attn_v"), (HEADS * width, HIDDEN)), "attn_output": (HIDDEN, HEADS * width)}
    for layer in range(LAYERS):
        for part, shape in (inner | heads).items():
            name = f"blk.{layer}.{part}.weight"
            packed = gguf.quantize(generator.normal(0, 0.2, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            if drop is None or drop not in name:
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("token_embd.weight", generator.normal(0, 0.2, (len(VOCAB), HIDDEN)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _usual(architecture: str, rule: str | None, pieces: bool) -> dict[str, Any]:
    tokens = PIECES if pieces else VOCAB
    special = {0: 2, 1: 3, 2: 3} if pieces else {len(VOCAB) - 1: 3}
    model = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": len(VOCAB),
    }
    assert len(tokens) == len(VOCAB)
    return {
        **{f"{architecture}.{name}": value for name, value in model.items()},
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))] if pieces else None,
        "tokenizer.ggml.token_type": [special.get(i, 1) for i in range(len(tokens))],
        "tokenizer.ggml.merges": None if pieces else ["t h", "h e"],
        "tokenizer.ggml.eos_token_id": 2 if pieces else len(VOCAB) - 1,
    }


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
