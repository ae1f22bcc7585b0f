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
from megatron_vocagno.errors import CorpusError, DatasetError
from megatron_vocagno.preprocess.build import JobRunner, build, finish
from megatron_vocagno.preprocess.inputs import find
from megatron_vocagno.preprocess.plan import SHARD_BYTES, plan
from megatron_vocagno.preprocess.shard_writer import OnBadLine
from megatron_vocagno.preprocess.shards import BuildConfig
from megatron_vocagno.preprocess.workers import Failure, run_local

from .console import Terminal, absolute, slice_of
from .progress import BuildProgress, VerifyProgress, summary

PROG = f"python -m {__package__}.build_dataset"
STAYS = "what is finished stays; the same command goes on from there"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
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
    args = parser.parse_args(argv)
    return run_command(lambda: args.do(args), args.after_interrupt)


# ---- commands


def build_dataset(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    out = absolute(place(args.out))
    with BuildProgress(Terminal(quiet=args.quiet), args.verbose) as progress:
        tell_of_encoders(settings, progress)
        build(
            [absolute(file) for file in find(args.inputs, progress.note)],
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
        print(f"part {args.shards.i} of {args.shards.n} is done; when all are: {PROG} finalize --out {out} …")
        return
    tell_of_dataset(out, progress.reused, args)


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
    tell_of_dataset(out, 0, args)


def verify(args: argparse.Namespace) -> None:
    manifest = read_whole(args.dataset, args.workers, args.quiet)
    print(f"{args.dataset}: {manifest.totals.documents:,} documents in {len(manifest.shards):,} shards are as they were written")


def read_whole(dataset: Place, workers: int, quiet: bool = False) -> Manifest:
    """Raises DatasetError that names all that is not as it was written."""
    root = local_folder(dataset)
    manifest = read_manifest(root)
    complaints = verify_frame(root, manifest)
    with VerifyProgress(Terminal(quiet=quiet), manifest) as progress:
        for found in run_local(verify_shard, shard_checks(root, manifest), workers):
            complaints += [found.reason] if isinstance(found, Failure) else found
            progress.shard()
    if complaints:
        advice = "delete the folder of each damaged shard, and run its build again: it makes what is missing"
        raise DatasetError("\n".join([f"{dataset} is not as it was written:", *complaints, advice]))
    return manifest


def merge_datasets(args: argparse.Namespace) -> None:
    dataset = merge(args.datasets, args.out)
    print(f"{dataset.path}: {len(dataset):,} documents of {len(args.datasets)} datasets")


# ---- arguments


def build_parser() -> Parser:
    parser = Parser(
        PROG,
        "INPUT... --student S --teacher T --out DIR",
        "Corpus files -> an aligned dataset, ready for training. Started again, it does what is missing.\n"
        "Other first words, each with a --help: plan, finalize, verify, merge.",
        f"{PROG} 'corpus/*.jsonl.zst' \\\n    --student models/student --teacher models/teacher --out data/mine --workers 8",
    )
    parser.set_defaults(do=build_dataset, after_interrupt=STAYS)
    add_inputs(parser)
    add_settings(parser)
    add_output(parser)
    parser.add_argument("--force", action="store_true", help="replace shards that were made from other input or settings")
    add_verbosity(parser, "a line for each shard with its seconds, and one every 5 seconds")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a cluster (default: local)")
    add_workers(where)
    where.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="of the Ray cluster (default: auto)")
    where.add_argument("--shards", type=slice_of, metavar="I/N", help="make the I-th of N parts, I from 1; then `finalize`")
    return parser


def plan_parser() -> Parser:
    parser = Parser(
        f"{PROG} plan",
        "INPUT... --student S --teacher T",
        "Print the shards that a build would make, and make none.",
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
        "Write dataset.json around the shards of a job array, with the options of its tasks.",
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
        "Read a dataset whole: hashes, ids, spans, losses. What is not as it was written is named.",
        f"{PROG} verify data/mine",
        "0 all is as it was written; 2 it is not, or cannot be read; 130 Ctrl-C",
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
        "One dataset of the documents of several. Their shards stay where they are: nothing is copied.",
        f"{PROG} merge data/web data/books --out data/both",
    )
    parser.set_defaults(do=merge_datasets, after_interrupt="remove --out before the next try if it is there")
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DIR", help="folders of datasets with the same tokenizers")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder (required)")
    return parser


def add_workers(group: argparse._ActionsContainer) -> None:
    cores = os.cpu_count() or 1
    group.add_argument("--workers", type=positive_int, metavar="N", default=cores, help="processes (default: one a core)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, @list.txt; local or URLs (s3://…)")
    parser.add_argument(
        "--max-documents", type=positive_int, metavar="N", help="the first N documents of all inputs (default: all)"
    )
    parser.add_argument(
        "--shard-mb", type=positive_float, metavar="MB", default=SHARD_BYTES / 2**20, help="MB of text in a shard (default: 64)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is made")
    tokenizer = "tokenizer (required): folder, tokenizer.json, .model, .gguf or Hub id"
    group.add_argument("--student", required=True, metavar="S", help=tokenizer)
    group.add_argument("--teacher", required=True, metavar="T", help="the same for the teacher (required)")
    group.add_argument("--student-eos", metavar="TOKEN", help="end-of-text token (default: the one that the tokenizer names)")
    group.add_argument("--teacher-eos", metavar="TOKEN", help="the same for the teacher")
    group.add_argument(
        "--text-key",
        action="append",
        metavar="KEY",
        help="key or column of the text; of several, the first there (default: text)",
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
    group.add_argument("--no-nfc", dest="nfc", action="store_false", help="leave the texts as they are, not NFC-normalised")
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        metavar="NAME",
        default="auto",
        help=f"who tokenizes: {either(Backend)} (default: auto)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the dataset, local or a URL (required)")
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        metavar="X",
        default=0.001,
        help="share of the records that may be bad (default: 0.001)",
    )
    parser.add_argument("--verify", action="store_true", help="read everything again at the end and check it")


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
    """Workers of a cluster start elsewhere. A GGUF file's is read as training reads its model: converted once, and kept."""
    path = Path(path_or_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        # torch and transformers take seconds to import
        from megatron_vocagno.model.gguf import cached_folder

        path = cached_folder(path)
    return str(absolute(path)) if path.exists() else path_or_id


def engine_of(args: argparse.Namespace, out: Place, progress: BuildProgress) -> JobRunner:
    if args.engine == "ray":
        from megatron_vocagno.preprocess.ray_engine import run_ray

        return partial(run_ray, address=args.ray_address)
    if args.workers > 1 and not isinstance(out, Path) and out.protocol == "memory":
        raise CorpusError(f"--out {out}: the memory of one process; use --workers 1")
    return partial(run_local, workers=args.workers, on_progress=progress.within)


def either(choices: object) -> str:
    """The values of a Literal, for help."""
    *most, last = get_args(choices)
    return f"{', '.join(most)} or {last}"


# ---- what came out


def tell_of_encoders(settings: BuildConfig, progress: BuildProgress) -> None:
    for side, tokenizer in zip(("student", "teacher"), settings.tokenizers, strict=True):
        why = f" ({tokenizer.not_fast})" if tokenizer.not_fast else ""
        progress.note(f"the {side}'s tokens come from {tokenizer.encoder.name}{why}")
        if tokenizer.eos_why:
            end = f"the {side}'s documents end with {tokenizer.eos_token}"
            progress.note(f"{end}: {tokenizer.eos_why}; --{side}-eos names another")


def tell_of_dataset(out: Place, reused: int, args: argparse.Namespace) -> None:
    manifest = read_whole(out, args.workers, args.quiet) if args.verify and isinstance(out, Path) else read_manifest(out)
    Terminal().print(summary(out, manifest, reused))


if __name__ == "__main__":
    sys.exit(main())
