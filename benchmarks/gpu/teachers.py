"""Teachers of 0.5B and 7B parameters that score documents, by the code of `score_teacher`, in bfloat16 with random weights.

MFU counts 2 FLOPs per token for each parameter that is multiplied (all apart from the input embedding).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.record import Task
from benchmarks.gpu.timing import OUT_OF_MEMORY, Rates, reason
from megatron_vocagno.corpus.manifest import Scoring
from megatron_vocagno.model.attention import resolve_attention
from megatron_vocagno.model.teacher import Teacher
from megatron_vocagno.preprocess.score_local import score_documents
from megatron_vocagno.preprocess.score_shard import ScoreJob

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-Math-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "tiny": SHAPES["Qwen2.5-0.5B"]
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
}
CONTEXT, TOKENS, TOKENS_PER_BATCH = 4096, 131_072, 16_384
"""Tokens of the longest document, of all documents, and of a forward pass: the default of `score_teacher`."""


def run(task: Task) -> None:
    shapes = TINY if task.rehearse else SHAPES
    task.note("Documents have lognormal lengths with a mean of about 1,000 tokens, and no document is read twice.")
    for number, (name, shape) in enumerate(shapes.items()):
        try:
            _measure(task, name, shape, 0.9 * task.left / (len(shapes) - number))
        except Exception as error:
            why = reason(error)
            task.add(name, result=why, failed=why != OUT_OF_MEMORY)
        if task.device != "cpu":
            torch.cuda.empty_cache()


def _measure(task: Task, name: str, shape: dict[str, Any], seconds: float) -> None:
    until = time.monotonic() + seconds
    teacher = build_teacher(shape, torch.device(task.device))
    lengths = _lengths(4000 if task.rehearse else TOKENS)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], int(lengths.sum()), dtype=np.int32)
    job = _job(name, 256 if task.rehearse else TOKENS_PER_BATCH)
    if task.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    few = int(lengths[:8].sum())
    score_documents(teacher, ids[:few], lengths[:8], job)  # a warm-up
    times = list[float]()
    while not times or (time.monotonic() + times[-1] < until and len(times) < 5):
        begin = time.perf_counter()
        losses, totals = score_documents(teacher, ids, lengths, job)
        times.append(time.perf_counter() - begin)
    best = min(times)
    numbers = {"tokens/s": len(ids) / best, "share of padding": totals.padding / totals.positions, "passes": len(times)}
    if task.device != "cpu":
        numbers["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    multiplied = teacher.parameters_count - (0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"])
    numbers |= Rates.of(task).mfu(2.0 * multiplied * len(ids) / best)
    task.add(f"{name}, scoring of {len(ids):,} tokens in {len(lengths)} documents", teacher.config._attn_implementation, numbers)
    finite = bool(np.isfinite(losses).all())
    task.check(f"{name}, every loss is finite", finite, {"mean loss, nats": float(losses.mean())})


def build_teacher(shape: dict[str, Any], device: torch.device) -> Teacher:
    """A Qwen2 with random weights, made on the device."""
    config = AutoConfig.for_model("qwen2", max_position_embeddings=CONTEXT, **shape)
    attention = resolve_attention(config, "auto", torch.bfloat16, device)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return Teacher(model)


def _lengths(tokens: int) -> NDArray[np.int32]:
    """[D] int32, lengths of documents with about this many tokens in total."""
    drawn = np.random.default_rng(0).lognormal(6.5, 0.9, 1 + tokens // 256).clip(1, CONTEXT).astype(np.int32)
    return drawn[: max(1, int(np.searchsorted(np.cumsum(drawn), tokens)))]


def _job(name: str, tokens_per_batch: int) -> ScoreJob:
    """Only the settings are read, because the documents are given."""
    scoring = Scoring(
        teacher="random", name=name, dtype="bfloat16", weights="as-is", context=CONTEXT, stride=CONTEXT // 2, before=0
    )
    return ScoreJob(0, Path(), None, scoring, Path(), tokens_per_batch)  # type: ignore[arg-type]
