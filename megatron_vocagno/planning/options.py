"""The command-line options that the plan and the dry run share. Imports nothing slow, so that --help is printed at once."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_vocagno.command import positive_float
from megatron_vocagno.planning.hardware import GPUS, Assumptions

ASSUMPTIONS_HELP = {
    "mfu": "share of the peak FLOP rate that the student reaches",
    "teacher_mfu": "share of the peak FLOP rate that the teacher reaches",
    "link_share": "share of the peak bandwidth that collectives reach",
    "memory_share": "share of the GPU memory that tensors may use",
    "teacher_tokens": "teacher tokens per student token",
    "unmapped": "share of student tokens that are unmapped",
    "reread": "tokens that scoring reads per token that it scores",
}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the run, the cluster and the assumptions."""
    parser.add_argument("run", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, metavar="FILE", help="the DeepSpeed configuration, JSON (required)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the run file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs on all nodes (required)")
    parser.add_argument("--gpu", default="h100", metavar="TYPE", help=f"{', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs per node (default: 8)")
    parser.add_argument("--tokens", type=positive_float, metavar="N", help="student tokens to train on (default: the run's)")
    parser.add_argument("--student-config", type=Path, metavar="FILE", help="config.json of a student that is not on disk")
    parser.add_argument(
        "--teacher-config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the same for a teacher; once per teacher",
    )
    assumed = parser.add_argument_group(
        "assumptions", "If the dataset exists, --teacher-tokens and --unmapped are read from it by default."
    )
    for field in fields(Assumptions):
        help_ = f"{ASSUMPTIONS_HELP[field.name]} (default: {field.default})"
        assumed.add_argument(f"--{field.name.replace('_', '-')}", type=float, metavar="X", help=help_)
