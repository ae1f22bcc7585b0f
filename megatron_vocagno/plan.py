"""The command that plans: memory, time and cost of a run on so many GPUs, before anything starts.

    python -m megatron_vocagno.plan RUN.toml --deepspeed_config ds_configs/X.json --gpus 32 --gpu h100

It reads the run's files and the two models' config.json, no weights. docs/clusters.md tells how to read it and what it rests on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_vocagno.command import Parser, positive_float, run_command
from megatron_vocagno.planning.hardware import GPUS, Assumptions

EXAMPLE = """python -m megatron_vocagno.plan examples/recipes/qwen2.5-math-instruct.toml \\
    --deepspeed_config ds_configs/gpu_zero1_bf16.json --gpus 32 --gpu h100 \\
    --student-config examples/plan/TinyLlama-1.1B.json \\
    --teacher-config examples/plan/Qwen2.5-Math-7B.json"""
ASSUMED = {
    "mfu": "share of the peak rate that the student's passes reach",
    "teacher_mfu": "share of the peak rate that the teacher's forward reaches",
    "link_share": "share of the peak bandwidth that collectives reach",
    "memory_share": "share of the memory that tensors may take",
    "teacher_tokens": "teacher tokens for each student token",
    "unmapped": "share of the student's tokens that are unmapped",
    "reread": "tokens that scoring reads for each that it scores",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: _print_plan(options))


def _print_plan(options: argparse.Namespace) -> None:
    # after the options are known to be right: torch takes seconds to import
    from megatron_vocagno.planning.question import answer

    print(answer(options), end="")


def parser() -> Parser:
    parser = Parser(
        "python -m megatron_vocagno.plan",
        "RUN.toml --deepspeed_config FILE --gpus N",
        "Memory, time and cost of a run, before anything starts. Nothing is downloaded, no weights are read.",
        EXAMPLE,
    )
    add_question(parser)
    parser.add_argument("--json", action="store_true", help="everything, unrounded, as JSON")
    return parser


def add_question(parser: argparse.ArgumentParser) -> None:
    """The options that say what run, on what cluster, under which assumptions."""
    parser.add_argument("run", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, metavar="FILE", help="the DeepSpeed configuration, JSON (required)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the run file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs over all nodes (required)")
    parser.add_argument("--gpu", default="h100", metavar="TYPE", help=f"{', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--tokens", type=positive_float, metavar="N", help="student tokens to learn from (default: the run's)")
    parser.add_argument("--student-config", type=Path, metavar="FILE", help="config.json of a student that is not here")
    parser.add_argument(
        "--teacher-config", type=Path, action="append", default=[], metavar="FILE", help="of a teacher, once for each"
    )
    assumed = parser.add_argument_group(
        "what is assumed", "A dataset that is there knows --teacher-tokens and --unmapped itself."
    )
    for field in fields(Assumptions):
        help_ = f"{ASSUMED[field.name]} (default: {field.default})"
        assumed.add_argument(f"--{field.name.replace('_', '-')}", type=float, metavar="X", help=help_)


if __name__ == "__main__":
    sys.exit(main())
