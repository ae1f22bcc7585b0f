"""Computes the teacher's loss of every token of a dataset. Training with `placement = "cached"` reads these losses.

    python -m tools.preprocess.score_teacher DATASET --teacher T
    torchrun --nproc_per_node 8 -m tools.preprocess.score_teacher DATASET --teacher T        one process per GPU
    torchrun --nproc_per_node 8 -m tools.preprocess.score_teacher DATASET --teacher T --placement zero3
    python -m tools.preprocess.score_teacher DATASET --teacher T --engine ray                one task per GPU of the cluster
    python -m tools.preprocess.score_teacher DATASET --teacher T --server http://node7:8000  vLLM or SGLang runs the teacher
    python -m tools.preprocess.score_teacher DATASET --reuse OTHER                           the same texts, for another student
    python -m tools.preprocess.score_teacher TEXTS --teacher T --out DIR                     texts alone, into parquet files

After an interruption, run the same command again: it scores the missing shards. With --shards 3/64 it scores the 3rd of 64 parts,
as one task of a job array. The last task to end records the losses in dataset.json. You can also record them with

    finalize DATASET
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vocagno.command import Parser, add_verbosity, positive_int, run_command
from megatron_vocagno.errors import tool

from .arguments import slice_of

if TYPE_CHECKING:
    from megatron_vocagno.config import Bos

PROG = tool("preprocess.score_teacher")
CODES = "0 done, 1 the server does not answer, 2 an error that you can fix, 130 Ctrl-C"
KEPT = "scored shards are kept; run the same command again to continue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "finalize":
        args = finalize_parser().parse_args(argv[1:])
        return run_command(lambda: run("finalize", args))
    if argv[:1] == ["texts"] or any(word.partition("=")[0] == "--out" for word in argv):
        args = texts_parser().parse_args(argv[1:] if argv[0] == "texts" else argv)
        return run_command(lambda: run("score_texts", args), KEPT)
    args = parser().parse_args(argv)
    if args.teacher is None and args.reuse is None:
        parser().error("the following arguments are required: --teacher (or --reuse)")
    return run_command(lambda: run("score", args), KEPT)


def run(command: str, args: argparse.Namespace) -> None:
    # imported after the options were checked, because torch and transformers take seconds to import
    from . import score_commands

    getattr(score_commands, command)(args)


def parser() -> Parser:
    parser = Parser(
        PROG,
        "DATASET --teacher T",
        "Compute the teacher's loss of every token of a dataset. Run it again to continue.\n"
        "Other uses, each with a --help: finalize (after a job array), texts (texts without a student).",
        f"torchrun --nproc_per_node 8 -m {__package__}.score_teacher data/mine --teacher models/teacher",
        CODES,
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a dataset, from build_dataset")
    teacher = "a folder with safetensors, a GGUF file, a Hub id"
    parser.add_argument("--teacher", type=Path, metavar="T", help=f"{teacher} (or --reuse)")
    parser.add_argument("--reuse", metavar="DATASET", help="a scored dataset of the same texts: take its losses")
    add_scoring(parser)
    add = parser.add_argument_group("on several machines").add_argument
    add("--engine", choices=["local", "ray"], default="local", help="this machine, or a cluster (default: local)")
    add("--ray-address", default="auto", metavar="HOST:PORT", help="address of the Ray cluster (default: auto)")
    add("--shards", type=slice_of, metavar="I/N", help="score the I-th of N parts, I from 1 (default: all)")
    return parser


def texts_parser() -> Parser:
    parser = Parser(
        f"{PROG} texts",
        "TEXTS... --teacher T --out DIR",
        "Compute the loss of every token of texts, without a student: parquet files with ids, byte ends and losses.",
        f"{PROG} texts texts.jsonl --teacher models/teacher --out scored",
        CODES,
    )
    parser.set_defaults(reuse=None, engine="local", shards=None)
    parser.add_argument("texts", nargs="+", metavar="TEXTS", help="files, folders, globs, @list.txt; local or URLs (s3://…)")
    parser.add_argument(
        "--teacher", required=True, type=Path, metavar="T", help="a folder with safetensors, or a Hub id (required)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the result (required)")
    parser.add_argument("--text-key", action="append", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument("--id-key", action="append", metavar="KEY", help="the same for an id (default: none)")
    add_scoring(parser)
    return parser


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
    add = parser.add_argument
    types = ["bfloat16", "float16", "float32"]
    add("--dtype", choices=types, metavar="TYPE", help=f"{', '.join(types)} (default: bfloat16, or the server's)")
    kinds = ["none", "int8", "fp8"]
    add("--quantization", choices=kinds, metavar="TO", default="none", help="of the weights: int8, fp8 (default: none)")
    # the old name of the option
    add("--weights", dest="quantization", type=quantization_of, choices=kinds, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add(
        "--context", type=positive_int, metavar="N", help="tokens of a window (default: 4096, or the most that the teacher reads)"
    )
    add("--stride", type=positive_int, metavar="N", help="tokens from window to window (default: half of --context)")
    bos = "prefix of each window (default: auto, as the teacher's tokenizer)"
    add("--bos", type=bos_of, metavar="auto|none|ID", default="auto", help=bos)
    batch = "tokens of one forward, padding included (default: 16384)"
    add("--tokens-per-batch", type=positive_int, metavar="N", default=16_384, help=batch)
    again = "score shards again that were scored with other options"
    add("--force", "--replace", dest="replace", action="store_true", help=again)
    add_verbosity(parser, "a line per shard on a terminal too, and one every 5 seconds")
    shared = "zero3: all processes share the weights (default: replicated)"
    add("--placement", choices=["replicated", "zero3"], default="replicated", metavar="WHERE", help=shared)
    add("--workers", type=positive_int, metavar="N", default=1, help="processes, without a GPU (default: 1)")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add = parser.add_argument_group("a teacher that a server runs").add_argument
    add("--server", type=urls_of, metavar="URL[,URL]", help="vLLM's or SGLang's server, or several of the same teacher")
    add("--served-model", metavar="NAME", help="the teacher's name there (default: the only one)")
    add("--in-flight", type=positive_int, metavar="N", default=64, help="open requests at a time (default: 64)")
    add("--timeout", type=positive_int, metavar="S", default=600, help="seconds of a request (default: 600)")
    add("--tries", type=positive_int, metavar="N", default=8, help="tries of a request (default: 8)")
    add("--check", type=positive_int, metavar="N", help="first compare N windows with the teacher here (default: none)")


def finalize_parser() -> Parser:
    parser = Parser(
        f"{PROG} finalize",
        "DATASET",
        "Record in dataset.json the losses that a job array has computed.",
        f"{PROG} finalize data/mine",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder whose shards are all scored")
    return parser


def urls_of(text: str) -> tuple[str, ...]:
    """A type for argparse: the base URLs, without /v1."""
    urls = tuple(url.rstrip("/").removesuffix("/v1") for url in text.split(","))
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise argparse.ArgumentTypeError(f"{url!r} is not a URL, for example http://localhost:8000")
    return urls


def quantization_of(text: str) -> str:
    """A type for argparse: the value of --quantization that replaces a value of --weights."""
    return "none" if text == "as-is" else text


def bos_of(text: str) -> Bos:
    """A type for argparse."""
    if text == "auto":
        return "auto"
    if text == "none":
        return "none"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or the id of a token")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
