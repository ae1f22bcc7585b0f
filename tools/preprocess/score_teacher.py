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
from typing import get_args

import torch
from rich.console import Console

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import local_folder
from megatron_vocagno.corpus.manifest import Manifest, read_manifest
from megatron_vocagno.corpus.plan import Slice
from megatron_vocagno.corpus.workers import run_local
from megatron_vocagno.hub import is_id
from megatron_vocagno.model.folder import ModelError, pinned
from megatron_vocagno.model.quantised import Weights
from megatron_vocagno.offline.score import CONTEXT, Asked, DType, Engine, ScoringError, finish, score
from tools.preprocess.build_dataset import positive_int, slice_of
from tools.preprocess.score_progress import ScoreProgress, summary

PINS = ".build/pins.json"
"""Of a dataset: the commits of Hub ids that have scored it, so that all tasks of an array read the same weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for an error that the message explains, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] == "finalize":
            finalize(argv[1:])
        else:
            score_teacher(argv)
    except (CorpusError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is scored stays; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def score_teacher(argv: Sequence[str]) -> None:
    args = arguments().parse_args(argv)
    path = local_folder(args.dataset).absolute()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    part = part_of(args.shards, rank, world)
    # tasks of a cluster start elsewhere
    read_manifest(path)  # before anything is written there
    [teacher] = pinned([args.teacher], path / PINS)
    teacher = teacher if is_id(teacher) else teacher.absolute()
    asked = Asked(teacher, args.dtype, args.weights, args.context, args.stride, args.tokens_per_batch)
    console = Console()
    with ScoreProgress(console, f"rank {rank}: " if world > 1 else "") as progress:
        manifest = score(path, asked, engine_of(args, progress), part, args.replace, progress.plan, progress.shard)
    tell(console, path, manifest, progress)


def finalize(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="score_teacher finalize", description="Record the losses that a job array has computed."
    )
    parser.add_argument("dataset")
    path = local_folder(parser.parse_args(argv).dataset)
    console = Console()
    tell(console, path, finish(path), ScoreProgress(console))


def tell(console: Console, path: Path, manifest: Manifest, progress: ScoreProgress) -> None:
    if manifest.teacher_losses is not None:
        console.print(summary(path, manifest.teacher_losses, progress))
    else:
        console.print(f"{progress.done:,} shards are done; others are not yet: the last process to end records them all")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="score_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder that build_dataset has made")
    parser.add_argument("--teacher", required=True, type=Path, help="a folder with safetensors, a GGUF file, or a Hub id")
    parser.add_argument("--dtype", choices=get_args(DType), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--weights", choices=get_args(Weights), default="as-is", help="quantise the decoder (default: as-is)")
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help=f"tokens of a window (default: {CONTEXT}, or what the teacher reads)"
    )
    parser.add_argument("--stride", type=positive_int, metavar="M", help="tokens from window to window (default: half of it)")
    parser.add_argument(
        "--tokens-per-batch", type=positive_int, metavar="K", default=16_384, help="of one forward, with padding (default: 16384)"
    )
    parser.add_argument("--replace", action="store_true", help="score anew what was scored otherwise")
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="this machine, or a Ray cluster (default: local)"
    )
    where.add_argument("--workers", type=positive_int, metavar="N", default=1, help="processes, without a GPU (default: 1)")
    where.add_argument("--ray-address", default="auto", help="ray: auto or HOST:PORT (default: auto)")
    where.add_argument("--shards", type=slice_of, metavar="I/N", default=Slice(), help="score the I-th of N parts, I from 1")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of the deepspeed launcher; LOCAL_RANK says it too
    return parser


def part_of(asked: Slice, rank: int, world: int) -> Slice | None:
    """Of the shards that `asked` holds, this rank's."""
    if (asked.n, world) == (1, 1):
        return None
    return Slice(asked.i + asked.n * rank, asked.n * world)


def engine_of(args: argparse.Namespace, progress: ScoreProgress) -> Engine:
    if args.engine == "ray":
        from megatron_vocagno.corpus.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address, on_gpus=True)
    if args.workers > 1 and torch.cuda.is_available():
        raise ScoringError(
            f"--workers {args.workers}: they would share one GPU. One process a GPU: "
            f"torchrun --nproc_per_node {torch.cuda.device_count()} -m tools.preprocess.score_teacher …"
        )
    return partial(run_local, workers=args.workers, on_progress=progress.within)


if __name__ == "__main__":
    sys.exit(main())
