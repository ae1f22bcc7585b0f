"""Converts a GGUF file to a Hugging Face folder with dequantized weights: config.json, model.safetensors, tokenizer.json.

    python -m tools.convert.gguf_to_safetensors FILE.gguf --out DIR

Training converts a GGUF teacher automatically and keeps the result in a cache. Use this command to inspect a model, to get its
tokenizer, or to prepare the folder for other machines.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vocagno.command import Parser, add_quiet, duration, run_command
from megatron_vocagno.errors import tool

PROG = tool("convert.gguf_to_safetensors")
MB_PER_SECOND = 5.0
"""Megabytes of a quantized file that one core converts per second (SmolLM2-135M, 49,152 tokens: 20 s for 100 MB, and 9 s for its
tokenizer).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    if options.quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' progress bar, which would write many lines
    # imported after the options were checked, because torch and transformers take seconds to import
    import torch

    from megatron_vocagno.model.gguf import check_conversion, dequantize

    source, _ = check_conversion(options.gguf, options.out)
    if not options.quiet:
        megabytes = source.stat().st_size / 1e6
        about = f"about {duration(megabytes / MB_PER_SECOND)} for its weights, and 10 s per 50,000 tokens of its vocabulary"
        print(f"{options.gguf}: {megabytes:,.0f} MB, {about}", flush=True)
        log = logging.getLogger("megatron_vocagno.model.gguf")
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)
    folder = dequantize(options.gguf, options.out, getattr(torch, options.dtype))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:,.0f} MB, {options.dtype}")


def parser() -> Parser:
    parser = Parser(
        PROG,
        "FILE.gguf --out DIR",
        "Convert a GGUF file to a Hugging Face folder: config.json, dequantized model.safetensors, tokenizer.json.",
        f"{PROG} models/SmolLM2-135M.Q4_1.gguf --out models/smollm2",
    )
    parser.add_argument("gguf", type=Path, metavar="FILE.gguf", help="the model, including its tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist (required)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="type of the weights: float32 is exact, bfloat16 half as large (default: float32)",
    )
    add_quiet(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
