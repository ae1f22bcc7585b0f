"""Measure the peak memory of scoring two prompts with a vocabulary of 151,936, as ratios.

    python -m benchmarks.score_memory [--write]           relative to Transformers' logits and cross-entropy
    python -m benchmarks.score_memory --vllm PYTHON       and to vLLM's prompt_logprobs, with an environment that has vllm
    python -m benchmarks.score_memory --quick             short prompts, a small vocabulary: checks that it runs

The model is a random Llama of 2 layers, d = 256, float32, on a CPU, so that what is measured is the way from hidden states to
losses. The prompts have 2,048 tokens each. Every arm is a separate process, and its peak memory is that of all its processes
(VmHWM), with imports and weights. vLLM's includes 1 GiB of KV cache. The arms must agree in the mean loss.

The goals are at most 0.2 × of Transformers, and 0.25 × of vLLM with 2,048 batched tokens. The exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.page import GOALS, PAGE, WRITE, Figure, circumstances, markdown, show, write_section
from benchmarks.score_memory_arms import MARK
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.errors import UserError
from megatron_vocagno.model.folder import quiet
from megatron_vocagno.preprocess.workers import ONE_THREAD

GB = 1e9
BATCHED = 2048, 512
"""vLLM's --max-num-batched-tokens."""
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Measured:
    """loss: mean, nats. peak: bytes"""

    loss: float
    peak: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.score_memory",
        "",
        "Measure the peak memory of scoring, relative to Transformers and vLLM.",
        "python -m benchmarks.score_memory --write",
        GOALS,
    )
    parser.add_argument("--write", nargs="?", const=PAGE, type=Path, metavar="PAGE", help=WRITE)
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="also run vLLM, with the Python interpreter of an environment that has vllm"
    )
    parser.add_argument("--quick", action="store_true", help="short prompts, a small vocabulary: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    length, vocabulary = (64, 500) if args.quick else (2048, 151_936)
    with TemporaryDirectory() as folder:
        figures = measure(Path(folder), length, vocabulary, args.vllm)
    if args.quick:
        figures = [Figure(figure.label, figure.measured) for figure in figures]  # imports are most of the memory
    show(figures)
    if not args.vllm:
        print("vLLM was not run: pass an interpreter with --vllm")
    if args.write:
        command = f"python -m benchmarks.score_memory{' --vllm PYTHON' if args.vllm else ''}{' --quick' if args.quick else ''}"
        write_section("score_memory", f"`{command}`, {circumstances('torch', 'transformers')}\n\n{markdown(figures)}", args.write)
    return int(any(figure.met is False for figure in figures))


def measure(folder: Path, length: int, vocabulary: int, vllm: str | None) -> list[Figure]:
    """vllm: a Python interpreter"""
    save_random(folder / "model", vocabulary)
    texts = np.random.default_rng(0).integers(3, vocabulary, (2, length))
    texts[:, 0] = 1  # their BOS
    (folder / "texts.json").write_text(json.dumps(texts.tolist()), encoding="utf-8")
    ours = measured("own", folder)
    figures = [against("Transformers' logits and cross-entropy", ours, measured("transformers", folder), 0.2)]
    for batched in BATCHED if vllm else ():
        theirs = measured("vllm", folder, batched, python=vllm)
        goal = 0.25 if batched == BATCHED[0] else None
        figures.append(against(f"vLLM's `prompt_logprobs` with {batched:,} batched tokens", ours, theirs, goal))
    return figures


def measured(arm: str, folder: Path, *more: int, python: str | None = None) -> Measured:
    """An arm of score_memory_arms, in a separate process. more: its further arguments. Raises UserError."""
    program = "import json, sys\nfrom benchmarks import score_memory_arms as arms\nname, folder, texts, *more = sys.argv[1:]\n"
    program += "getattr(arms, name)(folder, json.load(open(texts)), *map(int, more))"
    command = [python or sys.executable, "-c", program, arm, str(folder / "model"), str(folder / "texts.json"), *map(str, more)]
    home, settings = Path(__file__).parent.parent, {**ONE_THREAD, **VLLM, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=home, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if ended.returncode or len(lines) != 1:
        raise UserError(f"the process of {arm} ended with code {ended.returncode}: see its output above")
    return Measured(**json.loads(lines[0].removeprefix(MARK)))


def against(name: str, ours: Measured, theirs: Measured, most: float | None) -> Figure:
    if not math.isclose(ours.loss, theirs.loss, abs_tol=1e-4):
        raise UserError(f"the losses are not those of {name}: {ours.loss:.4f} nats per token here, {theirs.loss:.4f} there")
    ratio = ours.peak / theirs.peak
    label = f"peak memory of scoring, relative to {name}"
    text = f"{ratio:.2f} × ({ours.peak / GB:.2f} / {theirs.peak / GB:.2f} GB)"
    return Figure(label, text) if most is None else Figure(label, text, f"≤ {most:.2f} ×", ratio <= most)


def save_random(folder: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
