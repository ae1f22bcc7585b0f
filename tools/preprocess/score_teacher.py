"""Computes the teacher's loss of every token of a dataset. Training with `placement = "cached"` reads these losses.

    python -m tools.preprocess.score_teacher DATASET --teacher T
    torchrun --nproc_per_node 8 -m tools.preprocess.score_teacher DATASET --teacher T        one process per GPU
    torchrun … -m tools.preprocess.score_teacher DATASET --teacher T --placement zero3       a teacher larger than a GPU
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "finalize":
        args = finalize_parser().parse_args(argv[1:])
        return run_command(lambda: run("finalize", args))
    args = parser().parse_args(argv)
    if args.teacher is None and (args.reuse is None or args.out is not None):
        parser().error("the following arguments are required: --teacher (or --reuse)")
    if args.out is None and len(args.dataset) > 1:
        parser().error(f"one DATASET is expected, not {len(args.dataset)}; texts are scored with --out")
    return run_command(
        lambda: run("score" if args.out is None else "score_texts", args),
        "scored shards are kept; run the same command again to continue",
    )


def run(command: str, args: argparse.Namespace) -> None:
    # imported after the options were checked, because torch and transformers take seconds to import
    from . import score_commands

    getattr(score_commands, command)(args)


def parser() -> Parser:
    parser = Parser(
        PROG,
        "DATASET --teacher T",
        'Compute the teacher\'s loss of every token of a dataset, for `placement = "cached"`. Run it again to continue.\n'
        "After a job array, `finalize DATASET` records the losses if the last task could not.",
        f"{PROG} data/mine --teacher models/teacher\n"
        f"torchrun --nproc_per_node 8 -m {__package__}.score_teacher data/mine --teacher models/teacher",
    )
    parser.add_argument(
        "dataset", nargs="+", metavar="DATASET", help="folder of a dataset, from build_dataset; with --out, files of texts"
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="T", help="a folder with safetensors, a GGUF file, or a Hub id (required without --reuse)"
    )
    parser.add_argument(
        "--reuse", metavar="DATASET", help="a scored dataset: take its losses for the same teacher tokens, whatever its student"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="type of the forward (default: bfloat16, or the server's)"
    )
    kinds = ["none", "int8", "fp8"]
    parser.add_argument("--quantization", choices=kinds, default="none", help="of the decoder's weights (default: none)")
    # the old name of the option
    parser.add_argument(
        "--weights", dest="quantization", type=quantization_of, choices=kinds, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="tokens of a window (default: 4096, or the most that the teacher reads)"
    )
    parser.add_argument(
        "--stride", type=positive_int, metavar="N", help="tokens from window to window (default: half of --context)"
    )
    parser.add_argument(
        "--bos",
        type=bos_of,
        metavar="auto|none|ID",
        default="auto",
        help="prefix of each window (default: auto, the ids that the teacher's tokenizer puts in front of a text)",
    )
    parser.add_argument(
        "--tokens-per-batch",
        type=positive_int,
        metavar="N",
        default=16_384,
        help="tokens of one forward, padding included (default: 16384)",
    )
    parser.add_argument(
        "--force", "--replace", dest="replace", action="store_true", help="score shards again that were scored with other options"
    )
    add_verbosity(parser, "a line per shard on a terminal too, and one every 5 seconds")
    where = parser.add_argument_group("execution")
    where.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a cluster (default: local)")
    where.add_argument(
        "--placement",
        choices=["replicated", "zero3"],
        default="replicated",
        help="each process holds the teacher, or all share its weights (default: replicated)",
    )
    where.add_argument("--workers", type=positive_int, metavar="N", default=1, help="processes, without a GPU (default: 1)")
    where.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="address of the Ray cluster (default: auto)")
    where.add_argument("--shards", type=slice_of, metavar="I/N", help="score the I-th of N parts, I from 1 (default: all)")
    server = parser.add_argument_group("a teacher that a server runs")
    server.add_argument(
        "--server", type=urls_of, metavar="URL[,URL]", help="vLLM's or SGLang's server, or several of the same teacher"
    )
    server.add_argument("--served-model", metavar="NAME", help="the teacher's name there (default: the only one)")
    server.add_argument("--in-flight", type=positive_int, metavar="N", default=64, help="open requests at a time (default: 64)")
    server.add_argument("--timeout", type=positive_int, metavar="S", default=600, help="seconds of a request (default: 600)")
    server.add_argument("--tries", type=positive_int, metavar="N", default=8, help="tries of a request (default: 8)")
    server.add_argument(
        "--check", type=positive_int, metavar="N", help="compare N windows with the teacher in this process, before scoring"
    )
    texts = parser.add_argument_group("texts without a student")
    texts.add_argument(
        "--out", type=Path, metavar="DIR", help="score files of texts: parquet files with ids, byte ends and losses (DIR/losses)"
    )
    texts.add_argument("--text-key", action="append", metavar="KEY", help="key or column of the text (default: text)")
    texts.add_argument("--id-key", action="append", metavar="KEY", help="the same for an id (default: none)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
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
