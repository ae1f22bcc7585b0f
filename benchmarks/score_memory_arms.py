"""The arms of `benchmarks.score_memory`. Each one runs in a separate process, and prints its mean loss and its peak memory.

The arm of vLLM belongs to another environment, so this module imports only the standard library until an arm begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

MARK = "measured:"
"""Prefix of the line for the parent process. vLLM writes other lines."""


def own(folder: str, texts: list[list[int]]) -> None:
    """This project, as score_teacher runs it."""
    import numpy as np
    import torch

    from megatron_vocagno.corpus.manifest import Scoring
    from megatron_vocagno.model.teacher import open_teacher
    from megatron_vocagno.preprocess.score_local import score_documents
    from megatron_vocagno.preprocess.score_shard import ScoreJob

    torch.set_num_threads(1)
    length = len(texts[0])
    scoring = Scoring(
        teacher="random", name="random", dtype="float32", weights="as-is", context=length, stride=length, before=texts[0][0]
    )
    job = ScoreJob(0, Path(), None, scoring, Path(), tokens_per_batch=16_384)  # type: ignore[arg-type]
    ids = np.concatenate([np.array(text[1:], np.int32) for text in texts])
    lengths = np.full(len(texts), length - 1, np.int32)
    losses, _ = score_documents(open_teacher(folder, torch.float32, "cpu"), ids, lengths, job)
    report(float(losses.mean()))


def transformers(folder: str, texts: list[list[int]]) -> None:
    """The logits of a batch, and their cross-entropy."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(texts)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    report(losses.mean().item())


def vllm(folder: str, texts: list[list[int]], batched: int) -> None:
    """vLLM's `prompt_logprobs`. batched: its --max-num-batched-tokens"""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(texts[0]) + 2,
        max_num_batched_tokens=batched,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    prompts = [{"prompt_token_ids": text} for text in texts]
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    losses: list[float] = []
    for text, answer in zip(texts, engine.generate(prompts, settings, use_tqdm=False), strict=True):
        losses += [-told[token].logprob for token, told in zip(text[1:], answer.prompt_logprobs[1:], strict=True)]
    report(sum(losses) / len(losses))


def report(loss: float) -> None:
    print(MARK, json.dumps({"loss": loss, "peak": sum(peak_of(process) for process in family(os.getpid()))}), flush=True)


def family(process: int) -> Iterator[int]:
    """A process and its living descendants."""
    yield process
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield from family(int(child))


def peak_of(process: int) -> int:
    """Peak resident memory, bytes."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
