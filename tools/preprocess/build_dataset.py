"""Corpus files -> an aligned dataset, ready for training.

    python -m tools.preprocess.build_dataset corpus/*.jsonl.zst --student STUDENT --teacher TEACHER --out DIR --workers 8

Run it again after an interruption: it does what is missing. The same inputs and options with another first word:

    plan INPUT... --student S --teacher T      print the shards, make none
    INPUT... --out DIR --shards 3/64           make the 3rd of 64 parts: one task of a job array
    finalize --student S --teacher T --out DIR write dataset.json when all tasks are done
    verify DIR                                 read everything and check it
    merge A B --out C                          one dataset of several, without copying them
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.build import Engine, build, finish
from megatron_vocagno.corpus.dataset import AlignedDataset, DatasetError, local_folder, merge, read_manifest
from megatron_vocagno.corpus.encoders import Backend
from megatron_vocagno.corpus.inputs import find
from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.corpus.plan import SHARD_BYTES, Slice, plan
from megatron_vocagno.corpus.shards import OnBadLine, Settings
from megatron_vocagno.corpus.verify import shard_checks, verify_frame, verify_shard
from megatron_vocagno.corpus.workers import Failure, run_local
from tools.preprocess.progress import BuildProgress, summary

COMMANDS = ("plan", "finalize", "verify", "merge")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for an error that the message explains, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"plan": show_plan, "finalize": finalize, "verify": verify, "merge": merge_datasets}
    try:
        if argv and argv[0] in COMMANDS:
            commands[argv[0]](argv[1:])
        else:
            build_dataset(argv)
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is finished stays; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


# ---- commands


def build_dataset(argv: Sequence[str]) -> None:
    args = build_arguments().parse_args(argv)
    settings = settings_of(args)
    out = absolute(place(args.out))
    console = Console()
    with BuildProgress(console) as progress:
        tell_of_encoders(settings, progress)
        build(
            [absolute(file) for file in find(args.inputs)],
            out,
            settings,
            engine_of(args, out, progress),
            int(args.shard_mb * 2**20),
            args.max_documents,
            args.max_bad_fraction,
            args.force,
            args.shards,
            progress.plan,
            progress.shard,
            progress.note,
        )
    if args.shards:
        print(f"part {args.shards.i} of {args.shards.n} is done; when all are: build_dataset finalize --out {out} …")
        return
    tell_of_dataset(console, out, progress.reused, args.verify)


def show_plan(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="build_dataset plan", description="Print the shards that a build would make.")
    add_inputs(parser)
    add_settings(parser)
    args = parser.parse_args(argv)
    made = plan(find(args.inputs), settings_of(args), int(args.shard_mb * 2**20), args.max_documents)
    table = Table(title=f"{len(made.shards):,} shards, about {made.text_bytes / 1e6:,.1f} MB of text", title_justify="left")
    for name in ("shard", "from", "to", "files", "about MB of text"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right", overflow="fold")
    for i, pieces in enumerate(made.shards):
        ends = (
            Text(f"{place(piece.url).name}:{at:,}") for piece, at in ((pieces[0], pieces[0].start), (pieces[-1], pieces[-1].stop))
        )
        table.add_row(f"{i:04}", *ends, str(len(pieces)), f"{sum(p.weight for p in pieces) / 1e6:,.1f}")
    Console().print(table)


def finalize(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="build_dataset finalize", description="dataset.json around the shards of a job array.")
    add_settings(parser)
    add_output(parser)
    args = parser.parse_args(argv)
    out = finish(absolute(place(args.out)), settings_of(args), args.max_bad_fraction, lambda note: print(f"note: {note}"))
    tell_of_dataset(Console(), out, 0, args.verify)


def verify(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="build_dataset verify", description="Read a dataset whole: hashes, ids, spans.")
    parser.add_argument("dataset", type=place)
    add_workers(parser)
    args = parser.parse_args(argv)
    root = local_folder(args.dataset)
    manifest = read_manifest(root)
    complaints = verify_frame(root, manifest)
    for found in run_local(verify_shard, shard_checks(root, manifest), args.workers):
        complaints += [found.reason] if isinstance(found, Failure) else found
    if complaints:
        advice = "delete the folder of each damaged shard, and run its build again: it makes what is missing"
        raise DatasetError("\n".join([f"{args.dataset} is not as it was written:", *complaints, advice]))
    print(f"{args.dataset}: {manifest.totals.documents:,} documents in {len(manifest.shards):,} shards are as they were written")


def merge_datasets(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="build_dataset merge", description="One dataset of the documents of several; their shards stay where they are."
    )
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    dataset = merge(args.datasets, args.out)
    print(f"{dataset.path}: {len(dataset):,} documents of {len(args.datasets)} datasets")


# ---- arguments


def build_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_inputs(parser)
    add_settings(parser)
    add_output(parser)
    parser.add_argument("--force", action="store_true", help="replace shards that were made from other input or settings")
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="this machine, or a Ray cluster (default: local)"
    )
    add_workers(where)
    where.add_argument("--ray-address", default="auto", help="ray: auto or HOST:PORT (default: auto)")
    where.add_argument("--shards", type=slice_of, metavar="I/N", help="make the I-th of N parts, I from 1; then `finalize`")
    return parser


def add_workers(group: argparse._ActionsContainer) -> None:
    group.add_argument("--workers", type=positive_int, metavar="N", default=os.cpu_count() or 1, help="processes (default: all)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, @list.txt; local or URLs (s3://…)")
    parser.add_argument("--max-documents", type=positive_int, metavar="N", help="the first N records of all inputs alone")
    parser.add_argument(
        "--shard-mb", type=positive_float, metavar="MB", default=SHARD_BYTES / 2**20, help="text of a shard (default: 64)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is made")
    group.add_argument("--student", required=True, help="tokenizer: a folder, a tokenizer.json, or a SentencePiece model")
    group.add_argument("--teacher", required=True, help="the same for the teacher")
    group.add_argument("--student-eos", metavar="TOKEN", help="end-of-text token, where the tokenizer names none")
    group.add_argument("--teacher-eos", metavar="TOKEN", help="the same for the teacher")
    group.add_argument("--text-key", metavar="KEY", default="text", help="key or column of the text (default: text)")
    group.add_argument("--id-key", metavar="KEY", help="key or column of an id to keep with each document")
    group.add_argument(
        "--on-bad-line", choices=get_args(OnBadLine), default="error", help="records without text (default: error)"
    )
    group.add_argument("--no-nfc", dest="nfc", action="store_false", help="leave the texts as they are, not NFC-normalised")
    group.add_argument(
        "--backend", choices=get_args(Backend), default="auto", help="tokenizing library (default: gigatoken where it serves)"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder of the dataset, local or a URL (s3://…)")
    parser.add_argument(
        "--max-bad-fraction", type=fraction, metavar="X", default=0.001, help="refuse when more are bad (default: 0.001 of all)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again at the end and check it")


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        student=tokenizer_of(args.student),
        teacher=tokenizer_of(args.teacher),
        student_eos=args.student_eos,
        teacher_eos=args.teacher_eos,
        text_key=args.text_key,
        id_key=args.id_key,
        on_bad_line=args.on_bad_line,
        nfc=args.nfc,
        backend=args.backend,
    )


def tokenizer_of(path_or_id: str) -> str:
    return str(Path(path_or_id).absolute()) if Path(path_or_id).exists() else path_or_id


def absolute(where: Place) -> Place:
    """Workers of a cluster start elsewhere."""
    return where.absolute() if isinstance(where, Path) else where


def engine_of(args: argparse.Namespace, out: Place, progress: BuildProgress) -> Engine:
    if args.engine == "ray":
        from megatron_vocagno.corpus.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address)
    if args.workers > 1 and not isinstance(out, Path) and out.protocol == "memory":
        raise CorpusError(f"--out {out}: the memory of one process; use --workers 1")
    return partial(run_local, workers=args.workers, on_progress=progress.within)


def slice_of(text: str) -> Slice:
    i, _, n = text.partition("/")
    try:
        return Slice(int(i), int(n))
    except (ValueError, CorpusError):
        raise argparse.ArgumentTypeError(f"{text}: two numbers are needed, I/N with I from 1 to N") from None


def positive_int(text: str) -> int:
    return int(positive_float(str(int(text))))


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or has no end")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


# ---- what came out


def tell_of_encoders(settings: Settings, progress: BuildProgress) -> None:
    for side, tokenizer in zip(("student", "teacher"), settings.tokenizers, strict=True):
        why = f" ({tokenizer.not_fast})" if tokenizer.not_fast else ""
        progress.note(f"the {side}'s tokens come from {tokenizer.encoder.name}{why}")


def tell_of_dataset(console: Console, out: Place, reused: int, check: bool) -> None:
    if isinstance(out, Path):
        dataset = AlignedDataset.open(out)
        if check:
            dataset.verify()
        console.print(summary(out, dataset.manifest, reused))
    else:
        console.print(summary(out, read_manifest(out), reused))


if __name__ == "__main__":
    sys.exit(main())
