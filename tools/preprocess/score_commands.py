"""The commands of score_teacher: each gets the parsed options, and prints its result."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vocagno.corpus.dataset import AlignedDataset, local_folder
from megatron_vocagno.corpus.manifest import BUILD, Manifest, read_manifest
from megatron_vocagno.errors import CorpusError, ModelError, counted
from megatron_vocagno.hub import is_id
from megatron_vocagno.model.folder import pinned
from megatron_vocagno.preprocess.jobs import JobRunner
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.score import ScoringOptions, finish
from megatron_vocagno.preprocess.score import score as score_dataset
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreResult
from megatron_vocagno.preprocess.workers import run_local
from megatron_vocagno.serving.client import Servers

from .console import Terminal, absolute
from .score_progress import ScoreProgress, near_chance, summary

if TYPE_CHECKING:
    from megatron_vocagno.preprocess.score_local import ScoringTeacher

PINS = f"{BUILD}/pins.json"
"""File in a dataset with the commits of the Hub ids that scored it, so that all tasks of an array read the same weights."""


def score_texts(args: argparse.Namespace) -> None:
    """Build a dataset of the teacher's own tokens, score it, and write its losses as tables."""
    from . import build_commands, build_dataset

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or args.placement == "zero3":
        raise CorpusError(
            "texts are made into a dataset by one process. For several processes or --placement zero3, build the dataset with "
            "build_dataset and the teacher as the student, and score it under the launcher"
        )
    servers_of(args, workers=False)  # an error must come before the work
    dataset = args.out / "dataset"
    tokenizer = ("--student", str(args.teacher), "--teacher", str(args.teacher))
    keys = [word for key in args.text_key or () for word in ("--text-key", key)]
    keys += [word for key in args.id_key or () for word in ("--id-key", key)]
    words = [*args.texts, *tokenizer, *keys, "--out", str(dataset), "--workers", str(args.workers), "--quiet"]
    words += ["--force"] if args.replace else []
    build_commands.build_dataset(build_dataset.build_parser().parse_args(words))
    args.dataset = str(dataset)
    args.workers = 1 if args.server else args.workers
    score(args)
    data = AlignedDataset.open(dataset)
    if data.scoring is not None:
        # imported only here: see loss_table
        from megatron_vocagno.preprocess.loss_table import write_tables

        files = write_tables(data, args.out / "losses")
        Terminal().print(f"{counted(len(files), 'file')} with {len(data):,} documents: {args.out / 'losses'}", soft_wrap=True)


def score(args: argparse.Namespace) -> None:
    path = absolute(local_folder(args.dataset))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    part = part_of(args.shards or Slice(), rank, world)
    if args.teacher is not None and args.teacher.suffix == ".gguf":
        import torch  # noqa: F401 - an installation without it says so first

    read_manifest(path)  # an error must come before anything is written
    asked = options_of(args, path)
    reuse = None if args.reuse is None else absolute(local_folder(args.reuse))
    progress = ScoreProgress(Terminal(quiet=args.quiet), f"rank {rank}: " if world > 1 else "", args.verbose)
    with progress, engine_of(args, asked, progress) as engine:
        told = (progress.plan, progress.check, progress.shard)
        manifest = score_dataset(path, asked, engine, part, args.replace, reuse, *told)
    print_result(path, manifest, progress)


def finalize(args: argparse.Namespace) -> None:
    path = local_folder(args.dataset)
    print_result(path, finish(path), ScoreProgress(Terminal()))


def print_result(path: Path, manifest: Manifest, progress: ScoreProgress) -> None:
    if manifest.teacher_losses is not None:
        Terminal().print(summary(path, manifest.teacher_losses, progress))
        if (warning := near_chance(manifest.teacher_losses, manifest.teacher.vocab_size)) is not None:
            Terminal().print(warning, soft_wrap=True, markup=False, highlight=False)
    else:
        done = f"{counted(progress.done, 'shard')} {'is' if progress.done == 1 else 'are'} done"
        Terminal().print(f"{done}, others are not yet: the last process to end records all losses")


def part_of(part: Slice, rank: int, world: int) -> Slice | None:
    """This rank's share of the shards in `part`; None for all shards."""
    if (part.n, world) == (1, 1):
        return None
    return Slice(part.i + part.n * rank, part.n * world)


def options_of(args: argparse.Namespace, path: Path) -> ScoringOptions | None:
    """None without --teacher."""
    if args.teacher is None:
        for option, default in (("server", None), ("check", None), ("quantization", "none")):
            if getattr(args, option) != default:
                raise CorpusError(f"--{option} is for a teacher, and there is no --teacher")
        return None
    [teacher] = pinned([args.teacher], path / PINS)
    teacher = teacher if is_id(teacher) else absolute(teacher.expanduser())  # tasks of a cluster run in another folder
    windows = (args.context, args.stride, args.tokens_per_batch, args.bos)
    return ScoringOptions(teacher, args.dtype, args.quantization, *windows, servers_of(args), args.check or 0)


def servers_of(args: argparse.Namespace, workers: bool = True) -> Servers | None:
    """workers: whether --workers is the number of processes that score."""
    if args.server is None:
        if args.check is not None:
            raise CorpusError("--check compares a server with this process: it needs --server")
        return None
    for option, default in (("engine", "local"), ("quantization", "none"), *([("workers", 1)] if workers else [])):
        if getattr(args, option) != default:
            raise CorpusError(f"--{option} {getattr(args, option)} is for a teacher in this process, and --server is set")
    key = os.environ.get("MEGATRON_VOCAGNO_SERVER_KEY")
    return Servers(args.server, args.served_model, args.in_flight, args.timeout, args.tries, key)


@contextmanager
def engine_of(
    args: argparse.Namespace, asked: ScoringOptions | None, progress: ScoreProgress
) -> Iterator[JobRunner[ScoreResult, ScoreJob]]:
    """The engine for the jobs of this process."""
    if args.placement == "zero3":
        if asked is None or asked.servers is not None or args.engine != "local" or args.workers > 1:
            raise CorpusError("--placement zero3 needs --teacher, and neither --server, --engine ray nor --workers")
        with shared_teacher(asked) as teacher:
            yield lambda task, jobs, stop: run_local(partial(task, teacher=teacher), jobs, 1, stop, progress.within)
    elif args.engine == "ray":
        from megatron_vocagno.preprocess.ray_engine import run_ray

        yield partial(run_ray, address=args.ray_address, on_gpus=True)
    elif args.workers > 1 and asked is not None and (gpus := count_gpus()):
        raise CorpusError(
            f"--workers {args.workers}: the processes would share one GPU. Start one process per GPU: "
            f"torchrun --nproc_per_node {gpus} -m {__package__}.score_teacher …"
        )
    else:
        yield partial(run_local, workers=args.workers, on_progress=progress.within)


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def shared_teacher(asked: ScoringOptions) -> Iterator[ScoringTeacher]:
    """The teacher with its weights divided over all processes. At the end, a process waits for the others, and helps them."""
    # imported only here, because DeepSpeed takes seconds to import
    import torch

    from megatron_vocagno.engine import processes
    from megatron_vocagno.engine.collectives import run_on_all_ranks
    from megatron_vocagno.engine.lockstep import LockstepTeacher
    from megatron_vocagno.engine.placement import open_sharded
    from megatron_vocagno.model.teacher import find_teacher

    here = processes.start()
    dtype = getattr(torch, asked.dtype or "bfloat16")
    folder = run_on_all_ranks(lambda: find_teacher(asked.teacher, dtype, here.device), ModelError)
    teacher = LockstepTeacher(open_sharded(folder, asked.quantization), here.device)
    try:
        yield teacher
    except (KeyboardInterrupt, SystemExit):
        raise  # without the others, which the launcher ends
    except BaseException:
        teacher.finish()
        processes.stop()
        raise
    teacher.finish()
    processes.stop()
