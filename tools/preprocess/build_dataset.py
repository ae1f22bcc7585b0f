"""Builds an aligned dataset for training from corpus files.

    python -m tools.preprocess.build_dataset corpus/*.jsonl.zst --student STUDENT --teacher TEACHER --out DIR --workers 8

After an interruption, run the same command again: it makes the missing shards. Other uses:

    plan INPUT... --student S --teacher T      print the shards without making them
    INPUT... --out DIR --shards 3/64           make the 3rd of 64 parts, as one task of a job array
    finalize --student S --teacher T --out DIR write dataset.json when all tasks are done
    verify DIR                                 read and check the complete dataset
    merge A B --out C                          combine datasets into one without copying them
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from rich.table import Table
from rich.text import Text

from megatron_vocagno.command import Parser, add_quiet, add_verbosity, fraction, positive_float, positive_int, run_command
from megatron_vocagno.corpus.dataset import local_folder, merge
from megatron_vocagno.corpus.encoders import Backend
from megatron_vocagno.corpus.manifest import Manifest, read_manifest
from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.corpus.verify import shard_checks, verify_frame, verify_shard
from megatron_vocagno.errors import CorpusError, DatasetError, tool
from megatron_vocagno.preprocess.build import build, finish
from megatron_vocagno.preprocess.inputs import find
from megatron_vocagno.preprocess.jobs import JobRunner
from megatron_vocagno.preprocess.plan import SHARD_BYTES, plan
from megatron_vocagno.preprocess.shard_writer import OnBadLine
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult
from megatron_vocagno.preprocess.workers import JobFailure, run_local

from .console import Terminal, absolute, slice_of
from .progress import BuildProgress, VerifyProgress, summary

PROG = tool("preprocess.build_dataset")
STAYS = "finished shards are kept; run the same command again to continue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parsers: dict[str, Callable[[], Parser]] = {
        "plan": plan_parser,
        "finalize": finalize_parser,
        "verify": verify_parser,
        "merge": merge_parser,
    }
    if argv and argv[0] in parsers:
        parser, argv = parsers[argv[0]](), argv[1:]
    else:
        parser = build_parser()
        near = difflib.get_close_matches(argv[0], parsers, n=1, cutoff=0.8) if argv and argv[0].isalpha() else []
        if near and not Path(argv[0]).exists():
            parser.error(f"no input named {argv[0]!r}; did you mean the command {near[0]!r}?")
    args = parser.parse_args(argv)
    return run_command(lambda: args.do(args), args.after_interrupt)


# ---- commands


def build_dataset(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    out = absolute(place(args.out))
    with BuildProgress(Terminal(quiet=args.quiet), args.verbose) as progress:
        # first, because a tokenizer takes seconds to open
        inputs = [absolute(file) for file in find(args.inputs, progress.note)]
        note_encoders(settings, progress)
        build(
            inputs,
            out,
            settings,
            engine=engine_of(args, out, progress),
            shard_bytes=int(args.shard_mb * 2**20),
            max_documents=args.max_documents,
            max_bad_fraction=args.max_bad_fraction,
            force=args.force,
            part=args.shards,
            on_plan=progress.plan,
            on_shard=progress.shard,
            on_note=progress.note,
        )
    if args.shards:
        print(f"part {args.shards.i} of {args.shards.n} is done. When all parts are done, run: {PROG} finalize --out {out} …")
        return
    print_summary(out, progress.reused, args)


def show_plan(args: argparse.Namespace) -> None:
    made = plan(
        find(args.inputs, lambda note: print(f"note: {note}")), settings_of(args), int(args.shard_mb * 2**20), args.max_documents
    )
    table = Table(title=f"{len(made.shards):,} shards, about {made.text_bytes / 1e6:,.1f} MB of text", title_justify="left")
    for name in ("shard", "from", "to", "files", "about MB of text"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right", overflow="fold")
    for i, pieces in enumerate(made.shards):
        ends = (
            Text(f"{place(piece.url).name}:{at:,}") for piece, at in ((pieces[0], pieces[0].start), (pieces[-1], pieces[-1].stop))
        )
        table.add_row(f"{i:04}", *ends, str(len(pieces)), f"{sum(p.weight for p in pieces) / 1e6:,.1f}")
    Terminal().print(table)


def finalize(args: argparse.Namespace) -> None:
    def note(text: str) -> None:
        if not args.quiet:
            print(f"note: {text}")

    out = finish(absolute(place(args.out)), settings_of(args), args.max_bad_fraction, note)
    print_summary(out, 0, args)


def verify(args: argparse.Namespace) -> None:
    manifest = verify_dataset(args.dataset, args.workers, args.quiet)
    print(f"{args.dataset}: {manifest.totals.documents:,} documents in {len(manifest.shards):,} shards are intact")


def verify_dataset(dataset: Place, workers: int, quiet: bool = False) -> Manifest:
    """Read the complete dataset. Raises DatasetError that lists everything that has changed since it was written."""
    root = local_folder(dataset)
    manifest = read_manifest(root)
    complaints = verify_frame(root, manifest)
    with VerifyProgress(Terminal(quiet=quiet), manifest) as progress:
        for found in run_local(verify_shard, shard_checks(root, manifest), workers):
            complaints += [found.reason] if isinstance(found, JobFailure) else found
            progress.shard()
    if complaints:
        advice = "Delete the folder of each damaged shard and run the build again: it makes the missing shards."
        raise DatasetError("\n".join([f"{dataset} has changed since it was written:", *complaints, advice]))
    return manifest


def merge_datasets(args: argparse.Namespace) -> None:
    dataset = merge(args.datasets, args.out)
    print(f"{dataset.path}: {len(dataset):,} documents of {len(args.datasets)} datasets")


# ---- arguments


def build_parser() -> Parser:
    parser = Parser(
        PROG,
        "INPUT... --student S --teacher T --out DIR",
        "Build an aligned dataset for training from corpus files. Run the same command again to continue.\n"
        "Other uses, each with a --help: plan, finalize, verify, merge.",
        f"{PROG} 'corpus/*.jsonl.zst' \\\n    --student models/student --teacher models/teacher --out data/mine --workers 8",
    )
    parser.set_defaults(do=build_dataset, after_interrupt=STAYS)
    add_inputs(parser)
    add_settings(parser)
    add_output(parser)
    parser.add_argument("--force", action="store_true", help="replace shards made from other input or settings")
    add_verbosity(parser, "a line per shard with its seconds, and one every 5 seconds")
    where = parser.add_argument_group("execution")
    where.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a cluster (default: local)")
    add_workers(where)
    where.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="address of the Ray cluster (default: auto)")
    where.add_argument("--shards", type=slice_of, metavar="I/N", help="make the I-th of N parts, I from 1; then `finalize`")
    return parser


def plan_parser() -> Parser:
    parser = Parser(
        f"{PROG} plan",
        "INPUT... --student S --teacher T",
        "Print the shards that a build would make, without making them.",
        f"{PROG} plan 'corpus/*.jsonl.zst' \\\n    --student models/student --teacher models/teacher",
    )
    parser.set_defaults(do=show_plan, after_interrupt="nothing was written")
    add_inputs(parser)
    add_settings(parser)
    return parser


def finalize_parser() -> Parser:
    parser = Parser(
        f"{PROG} finalize",
        "--student S --teacher T --out DIR",
        "Write dataset.json after a job array has made all shards. Use the same options as for its tasks.",
        f"{PROG} finalize \\\n    --student models/student --teacher models/teacher --out data/mine",
    )
    parser.set_defaults(do=finalize, after_interrupt=STAYS)
    add_settings(parser)
    add_output(parser)
    add_workers(parser)
    add_quiet(parser)
    return parser


def verify_parser() -> Parser:
    parser = Parser(
        f"{PROG} verify",
        "DIR",
        "Read and check a complete dataset: hashes, ids, spans, losses. Changes since it was written are listed.",
        f"{PROG} verify data/mine",
        "0 intact, 2 changed or not readable, 130 Ctrl-C",
    )
    parser.set_defaults(do=verify, after_interrupt="nothing was written")
    parser.add_argument("dataset", type=place, metavar="DIR", help="folder of the dataset")
    add_workers(parser)
    add_quiet(parser)
    return parser


def merge_parser() -> Parser:
    parser = Parser(
        f"{PROG} merge",
        "DIR... --out DIR",
        "Combine datasets into one. Their shards stay in place: nothing is copied.",
        f"{PROG} merge data/web data/books --out data/both",
    )
    parser.set_defaults(do=merge_datasets, after_interrupt="if the folder of --out exists, remove it before you try again")
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DIR", help="folders of datasets with the same tokenizers")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder (required)")
    return parser


def add_workers(group: argparse._ActionsContainer) -> None:
    cores = os.cpu_count() or 1
    group.add_argument("--workers", type=positive_int, metavar="N", default=cores, help="processes (default: one per core)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, @list.txt; local or URLs (s3://…)")
    parser.add_argument("--max-documents", type=positive_int, metavar="N", help="first N documents of all inputs (default: all)")
    parser.add_argument(
        "--shard-mb", type=positive_float, metavar="MB", default=SHARD_BYTES / 2**20, help="MB of text per shard (default: 64)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("content")
    tokenizer = "tokenizer (required): folder, tokenizer.json, .model, .gguf or Hub id"
    group.add_argument("--student", required=True, metavar="S", help=tokenizer)
    group.add_argument("--teacher", required=True, metavar="T", help="the same for the teacher (required)")
    group.add_argument("--student-eos", metavar="TOKEN", help="end-of-text token (default: the tokenizer's own)")
    group.add_argument("--teacher-eos", metavar="TOKEN", help="the same for the teacher")
    group.add_argument(
        "--text-key",
        action="append",
        metavar="KEY",
        help="key or column of the text, the first one in a record (default: text)",
    )
    group.add_argument(
        "--id-key", action="append", metavar="KEY", help="the same for an id to keep with each document (default: none)"
    )
    group.add_argument(
        "--on-bad-line",
        choices=get_args(OnBadLine),
        metavar="DO",
        default="error",
        help=f"records without text: {either(OnBadLine)} (default: error)",
    )
    group.add_argument("--no-nfc", dest="nfc", action="store_false", help="do not normalize the texts to NFC")
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        metavar="NAME",
        default="auto",
        help=f"tokenizer backend: {either(Backend)} (default: auto)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the dataset, local or a URL (required)")
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        metavar="X",
        default=0.001,
        help="largest allowed share of bad records (default: 0.001)",
    )
    parser.add_argument("--verify", action="store_true", help="read and check the complete dataset at the end")


def settings_of(args: argparse.Namespace) -> BuildConfig:
    return BuildConfig(
        student=tokenizer_of(args.student),
        teacher=tokenizer_of(args.teacher),
        student_eos=args.student_eos,
        teacher_eos=args.teacher_eos,
        text_key=tuple(args.text_key or ["text"]),
        id_key=tuple(args.id_key or []),
        on_bad_line=args.on_bad_line,
        nfc=args.nfc,
        backend=args.backend,
    )


def tokenizer_of(path_or_id: str) -> str:
    """The absolute path of a tokenizer, because workers of a cluster run in another folder; a Hub id stays as it is. For a GGUF
    file, the path of its converted folder, which training uses too.
    """
    path = Path(path_or_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        # torch and transformers take seconds to import
        from megatron_vocagno.model.gguf import cached_folder

        path = cached_folder(path)
    return str(absolute(path)) if path.exists() else path_or_id


def engine_of(args: argparse.Namespace, out: Place, progress: BuildProgress) -> JobRunner[ShardResult, ShardJob]:
    if args.engine == "ray":
        from megatron_vocagno.preprocess.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address)
    if args.workers > 1 and not isinstance(out, Path) and out.protocol == "memory":
        raise CorpusError(f"--out {out} is in the memory of one process: use --workers 1")
    return partial(run_local, workers=args.workers, on_progress=progress.within)


def either(choices: object) -> str:
    """The values of a Literal as a text for the help: "a, b or c"."""
    *most, last = get_args(choices)
    return f"{', '.join(most)} or {last}"


# ---- results


def note_encoders(settings: BuildConfig, progress: BuildProgress) -> None:
    for side, tokenizer in zip(("student", "teacher"), settings.tokenizers, strict=True):
        why = f" ({tokenizer.not_fast})" if tokenizer.not_fast else ""
        progress.note(f"tokenizer backend of the {side}: {tokenizer.encoder.name}{why}")
        if tokenizer.eos_why:
            end = f"the {side}'s documents end with {tokenizer.eos_token}, {tokenizer.eos_why}"
            progress.note(f"{end}. To change this, set --{side}-eos")


def print_summary(out: Place, reused: int, args: argparse.Namespace) -> None:
    verified = args.verify and isinstance(out, Path)
    manifest = verify_dataset(out, args.workers, args.quiet) if verified else read_manifest(out)
    Terminal().print(summary(out, manifest, reused))


if __name__ == "__main__":
    sys.exit(main())
