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
from pathlib import Path

from megatron_vocagno.command import Parser, add_quiet, add_verbosity, fraction, positive_float, positive_int, run_command
from megatron_vocagno.errors import tool

from .arguments import slice_of

PROG = tool("preprocess.build_dataset")
BACKENDS = ["auto", "gigatoken", "huggingface"]
ON_BAD_LINE = ["error", "skip", "quarantine"]
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
    return run_command(lambda: run(args), args.after_interrupt)


def run(args: argparse.Namespace) -> None:
    from . import build_commands  # imported after the options were checked, because its imports take most of a second

    with build_commands.naming_ggufs(args):
        getattr(build_commands, args.do)(args)


# ---- arguments


def build_parser() -> Parser:
    parser = Parser(
        PROG,
        "INPUT... --student S --teacher T --out DIR",
        "Build an aligned dataset for training from corpus files. Run the same command again to continue.\n"
        "Other uses, each with a --help: plan, finalize, verify, merge.",
        f"{PROG} 'corpus/*.jsonl.zst' \\\n    --student models/student --teacher models/teacher --out data/mine --workers 8",
    )
    parser.set_defaults(do="build_dataset", after_interrupt=STAYS)
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
    parser.set_defaults(do="show_plan", after_interrupt="nothing was written")
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
    parser.set_defaults(do="finalize", after_interrupt=STAYS)
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
    parser.set_defaults(do="verify", after_interrupt="nothing was written")
    parser.add_argument("dataset", metavar="DIR", help="folder of the dataset")
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
    parser.set_defaults(do="merge_datasets", after_interrupt="if the folder of --out exists, remove it before you try again")
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DIR", help="folders of datasets with the same tokenizers")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder (required)")
    return parser


def add_workers(group: argparse._ActionsContainer) -> None:
    cores = os.cpu_count() or 1
    group.add_argument("--workers", type=positive_int, metavar="N", default=cores, help="processes (default: one per core)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, @list.txt; local or URLs (s3://…)")
    parser.add_argument("--max-documents", type=positive_int, metavar="N", help="first N documents of all inputs (default: all)")
    parser.add_argument("--shard-mb", type=positive_float, metavar="MB", default=64.0, help="MB of text per shard (default: 64)")


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
        choices=ON_BAD_LINE,
        metavar="DO",
        default="error",
        help=f"records without text: {either(ON_BAD_LINE)} (default: error)",
    )
    group.add_argument("--no-nfc", dest="nfc", action="store_false", help="do not normalize the texts to NFC")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        metavar="NAME",
        default="auto",
        help=f"tokenizer backend: {either(BACKENDS)} (default: auto)",
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


def either(choices: Sequence[str]) -> str:
    """The choices as a text for the help: "a, b or c"."""
    *most, last = choices
    return f"{', '.join(most)} or {last}"


if __name__ == "__main__":
    sys.exit(main())
