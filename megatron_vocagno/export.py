"""A run's newest whole checkpoint as a Hugging Face folder: weights, configuration and tokenizer.

    python -m megatron_vocagno.export RUN_DIR --out HF_DIR

It reads safetensors and JSON alone, and knows no engine: a checkpoint holds the student's weights under Hugging Face names,
whatever number of stages and ZeRO stage it was trained with.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.config import RunError

if TYPE_CHECKING:
    import torch


def export(run_dir: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the newest whole checkpoint of a run as a Hugging Face folder. Returns the checkpoint's folder.

    dtype: of the written weights; None keeps the checkpoint's. Raises RunError: no checkpoint, `out` holds something already.
    """
    # the command's words are read before: torch takes seconds to import
    from safetensors.torch import load_file
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from megatron_vocagno.engine.manifest import STUDENT, TOKENIZER, newest_checkpoint
    from megatron_vocagno.model.folder import to_hugging_face

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: exporting would mix two models. Remove it, or give another --out")
    checkpoint = newest_checkpoint(run_dir, lambda text: print(text, file=sys.stderr))
    if checkpoint is None:
        raise RunError(f"no whole checkpoint below {run_dir}: is it the 'output' folder of a run that has saved one?")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    state: dict[str, torch.Tensor] = {}
    for file in sorted((checkpoint / STUDENT).glob("*.safetensors")):
        state |= load_file(file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint / TOKENIZER, local_files_only=True)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        to_hugging_face(config, state, folder, dtype)
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            file.rename(out / file.name)
    return checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: _export(options), "nothing was written")


def _export(options: argparse.Namespace) -> None:
    import torch

    checkpoint = export(options.run_dir, options.out, getattr(torch, options.dtype) if options.dtype else None)
    print(f"{checkpoint} -> {options.out}")


def parser() -> Parser:
    parser = Parser(
        "python -m megatron_vocagno.export",
        "RUN_DIR --out HF_DIR",
        "Write a run's newest whole checkpoint as a Hugging Face folder: weights, configuration, tokenizer.",
        "python -m megatron_vocagno.export runs/mine --out runs/mine-hf --dtype bfloat16",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's output folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="HF_DIR", help="the folder to write; must not exist or be empty (required)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as trained)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
