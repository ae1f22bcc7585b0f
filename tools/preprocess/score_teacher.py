"""A dataset and a teacher -> the teacher's loss of every token, beside the ids. Training with `placement = "cached"` reads it.

    python -m tools.preprocess.score_teacher DATASET --teacher T
    torchrun --nproc_per_node 8 -m tools.preprocess.score_teacher DATASET --teacher T        one process a GPU
    python -m tools.preprocess.score_teacher DATASET --teacher T --engine ray                one task a GPU of the cluster

Run it again after an interruption: it does what is missing. The same options with --shards 3/64 score the 3rd of 64 parts, one
task of a job array; the last one to end records the losses in dataset.json, and so does

    finalize DATASET
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vocagno.command import Parser, add_verbosity, positive_int, run_command
from megatron_vocagno.config import Bos
from megatron_vocagno.corpus.dataset import local_folder
from megatron_vocagno.corpus.manifest import BUILD, Manifest, read_manifest
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.hub import is_id
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.workers import run_local

from .console import Terminal, absolute, slice_of

if TYPE_CHECKING:
    from megatron_vocagno.preprocess.score import JobRunner

    from .score_progress import ScoreProgress

PROG = f"python -m {__package__}.score_teacher"
PINS = f"{BUILD}/pins.json"
"""Of a dataset: the commits of Hub ids that have scored it, so that all tasks of an array read the same weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "finalize":
        args = finalize_parser().parse_args(argv[1:])
        return run_command(lambda: finalize(args))
    args = parser().parse_args(argv)
    return run_command(lambda: score_teacher(args), "what is scored stays; the same command goes on from there")


def score_teacher(args: argparse.Namespace) -> None:
    # after the options are known to be right: torch and transformers take seconds to import
    from megatron_vocagno.model.folder import pinned
    from megatron_vocagno.preprocess.score import ScoringOptions, score

    from .score_progress import ScoreProgress

    path = absolute(local_folder(args.dataset))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    part = part_of(args.shards, rank, world)
    # tasks of a cluster start elsewhere
    read_manifest(path)  # before anything is written there
    [teacher] = pinned([args.teacher], path / PINS)
    teacher = teacher if is_id(teacher) else absolute(teacher.expanduser())
    asked = ScoringOptions(teacher, args.dtype, args.quantization, args.context, args.stride, args.tokens_per_batch, args.bos)
    with ScoreProgress(Terminal(quiet=args.quiet), f"rank {rank}: " if world > 1 else "", args.verbose) as progress:
        manifest = score(path, asked, engine_of(args, progress), part, args.replace, progress.plan, progress.shard)
    tell(path, manifest, progress)


def finalize(args: argparse.Namespace) -> None:
    from megatron_vocagno.preprocess.score import finish

    from .score_progress import ScoreProgress

    path = local_folder(args.dataset)
    tell(path, finish(path), ScoreProgress(Terminal()))


def tell(path: Path, manifest: Manifest, progress: ScoreProgress) -> None:
    from .score_progress import near_chance, summary

    if manifest.teacher_losses is not None:
        Terminal().print(summary(path, manifest.teacher_losses, progress))
        if (warning := near_chance(manifest.teacher_losses, manifest.teacher.vocab_size)) is not None:
            Terminal().print(warning, soft_wrap=True, markup=False, highlight=False)
    else:
        Terminal().print(f"{progress.done:,} shards are done; others are not yet: the last process to end records them all")


def parser() -> Parser:
    parser = Parser(
        PROG,
        "DATASET --teacher T",
        'The teacher\'s loss of every token of a dataset, for `placement = "cached"`. Started again, it does what is missing.\n'
        "After a job array, `finalize DATASET` records the losses if the last task could not.",
        f"{PROG} data/mine --teacher models/teacher\n"
        f"torchrun --nproc_per_node 8 -m {PROG.split()[-1]} data/mine --teacher models/teacher",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder that build_dataset has made")
    parser.add_argument(
        "--teacher", required=True, type=Path, metavar="T", help="(required) a folder with safetensors, a GGUF file, or a Hub id"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the forward (default: bfloat16)"
    )
    kinds = ["none", "int8", "fp8"]
    parser.add_argument("--quantization", choices=kinds, default="none", help="of the decoder's weights (default: none)")
    # the name of earlier releases
    parser.add_argument(
        "--weights", dest="quantization", type=quantization_of, choices=kinds, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="tokens of a window (default: 4096, or what the teacher reads)"
    )
    parser.add_argument(
        "--stride", type=positive_int, metavar="N", help="tokens from window to window (default: half of --context)"
    )
    parser.add_argument(
        "--bos",
        type=bos_of,
        metavar="auto|none|ID",
        default="auto",
        help="read in front of each window (default: auto, what the teacher's own tokenizer puts in front of a text)",
    )
    parser.add_argument(
        "--tokens-per-batch",
        type=positive_int,
        metavar="N",
        default=16_384,
        help="tokens of one forward, with padding (default: 16384)",
    )
    parser.add_argument("--force", "--replace", dest="replace", action="store_true", help="score anew what was scored otherwise")
    add_verbosity(parser, "a line for each shard on a terminal too, and one every 5 seconds")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a cluster (default: local)")
    where.add_argument("--workers", type=positive_int, metavar="N", default=1, help="processes, without a GPU (default: 1)")
    where.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="of the Ray cluster (default: auto)")
    where.add_argument(
        "--shards", type=slice_of, metavar="I/N", default=Slice(), help="score the I-th of N parts, I from 1 (default: all)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of the deepspeed launcher; LOCAL_RANK says it too
    return parser


def finalize_parser() -> Parser:
    parser = Parser(
        f"{PROG} finalize",
        "DATASET",
        "Record in dataset.json the losses that a job array has computed.",
        f"{PROG} finalize data/mine",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder whose shards are all scored")
    return parser


def quantization_of(text: str) -> str:
    """For argparse: the value of --quantization for one of --weights."""
    return "none" if text == "as-is" else text


def bos_of(text: str) -> Bos:
    """For argparse."""
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: auto, none or the id of a token expected")
    return int(text)


def part_of(asked: Slice, rank: int, world: int) -> Slice | None:
    """Of the shards that `asked` holds, this rank's."""
    if (asked.n, world) == (1, 1):
        return None
    return Slice(asked.i + asked.n * rank, asked.n * world)


def engine_of(args: argparse.Namespace, progress: ScoreProgress) -> JobRunner:
    import torch

    if args.engine == "ray":
        from megatron_vocagno.preprocess.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address, on_gpus=True)
    if args.workers > 1 and torch.cuda.is_available():
        raise CorpusError(
            f"--workers {args.workers}: they would share one GPU. One process a GPU: "
            f"torchrun --nproc_per_node {torch.cuda.device_count()} -m {PROG.split()[-1]} …"
        )
    return partial(run_local, workers=args.workers, on_progress=progress.within)


if __name__ == "__main__":
    sys.exit(main())
