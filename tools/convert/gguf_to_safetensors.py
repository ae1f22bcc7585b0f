"""A GGUF file as a Hugging Face folder, dequantised: config.json, model.safetensors, tokenizer.json.

    python -m tools.convert.gguf_to_safetensors FILE.gguf --out DIR

Training converts a GGUF teacher by itself and keeps the result in a cache; this is for looking at one, for its tokenizer,
and for machines that should find the folder ready.
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron_vocagno.model.folder import ModelError
from megatron_vocagno.model.gguf import dequantise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.convert.gguf_to_safetensors", description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path, metavar="FILE.gguf")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the weights: float32 is exact, bfloat16 half as large (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        folder = dequantise(options.gguf, options.out, getattr(torch, options.dtype))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:,.0f} MB, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
