"""Measure the memory of a rank if N ranks share each row (`parallel.sequence`), relative to one rank, on a CPU.

    python -m benchmarks.sequence [--write]      the table; --write puts it into docs/performance.md
    python -m benchmarks.sequence --quick        short rows: checks that it runs

A step is the forward and the backward pass of one row through a Llama student in float32, with its loss, without an engine.
Memory is the growth of VmHWM of the fullest rank over weights and their gradients, which N does not change. N processes exchange
heads and losses over gloo. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import LlamaConfig

from benchmarks import step_memory
from benchmarks.page import GOALS, Figure, circumstances, markdown, show, write_section
from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.command import Parser, run_command
from tests.runs import free_port

RANKS = (1, 2, 4)
LENGTH, LAYERS, VOCABULARY = 4_096, 4, 1_024
MOST = 1.2
"""Goal: the most memory of all ranks together, relative to one rank. New gradients of weights are not divided."""


def student(length: int) -> LlamaConfig:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**sizes, vocab_size=VOCABULARY, num_hidden_layers=LAYERS, max_position_embeddings=length)


def growth(rank: int, ranks: int, length: int, port: int) -> int:
    """Peak bytes that a step adds on this rank."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    # imported here, because DeepSpeed reads the variables
    from megatron_vocagno.config import Guidance
    from megatron_vocagno.engine.loss import GuidedObjective, LossInputs
    from megatron_vocagno.engine.processes import start, stop
    from megatron_vocagno.engine.sequence import divide_ranks, use_ulysses
    from megatron_vocagno.model.attention import ULYSSES
    from megatron_vocagno.model.student import Student
    from megatron_vocagno.objective.linear_ce import SelectedTokens

    processes = start()
    config = student(length)
    parts, group = divide_ranks(ranks)
    use_ulysses(parts, config, processes.device)
    config._attn_implementation = ULYSSES if ranks > 1 else "sdpa"
    model = Student(config, seed=0)
    objective = GuidedObjective(Guidance(objective="clm"), processes.device, group, parts=parts)

    def take_step(positions: int) -> None:
        target_1S = torch.arange(positions)[None] % config.vocab_size
        nothing_1S = torch.zeros(1, positions, dtype=torch.int32)
        capacity_C0 = torch.empty(positions, 0)
        text_1S = target_1S != IGNORE
        inputs = LossInputs(target_1S, torch.empty(1, 0), nothing_1S, nothing_1S, torch.ones(1), capacity_C0, text_1S)
        ids = parts.part(target_1S.roll(1, 1)), parts.part(torch.arange(positions, dtype=torch.int32)[None])
        selected = SelectedTokens()
        loss = objective(model(ids, parts.part(target_1S), selected), inputs, selected)
        loss.backward()  # type: ignore[no-untyped-call]

    take_step(16 * ranks)  # gradients, and allocations that libraries make once
    before = step_memory.start()
    take_step(length)
    grown = step_memory.peak() - before
    stop()
    return grown


def fullest(ranks: int, length: int) -> int:
    """Peak bytes that a step adds on the fullest of `ranks` ranks."""
    port = free_port()
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        return max(pool.map(growth, range(ranks), [ranks] * ranks, [length] * ranks, [port] * ranks))


def measure(length: int) -> list[Figure]:
    found = {ranks: fullest(ranks, length) for ranks in RANKS}
    figures = [Figure("one rank", f"{found[1] / 1e6:,.0f} MB")]
    for ranks in RANKS[1:]:
        together = ranks * found[ranks] / found[1]
        figures.append(
            Figure(
                f"{ranks} ranks: memory of the fullest",
                f"{found[ranks] / found[1]:.2f} × ({found[ranks] / 1e6:,.0f} MB)",
                f"≤ {MOST / ranks:.2f} ×",
                together <= MOST,
            )
        )
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.sequence",
        "",
        "Measure the memory of a rank if N ranks share each row, relative to one rank.",
        "python -m benchmarks.sequence --write",
        GOALS,
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="rows of an eighth of the length")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    figures = measure(LENGTH // 8 if args.quick else LENGTH)
    show(figures)
    if args.write:
        write_section("sequence", section(figures))
    return int(any(figure.met is False for figure in figures))


TEXT = f"""The student is a Llama of {LAYERS} layers, d = 256, {VOCABULARY:,} tokens, float32.
A step is one row of {LENGTH:,} tokens.
Memory is what the forward and the backward pass add to weights and gradients."""


def section(figures: Sequence[Figure]) -> str:
    return f"`python -m benchmarks.sequence`, {circumstances('torch', 'transformers')}\n\n{TEXT}\n\n{markdown(figures)}"


if __name__ == "__main__":
    sys.exit(main())
