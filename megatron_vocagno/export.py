"""A run's newest whole checkpoint as a Hugging Face folder: weights, configuration and tokenizer.

    python -m megatron_vocagno.export RUN_DIR --out HF_DIR

It reads safetensors and JSON alone, and knows no engine: a checkpoint holds the student's weights under Hugging Face names,
whatever number of stages and ZeRO stage it was trained with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from megatron_vocagno.config import RunError
from megatron_vocagno.engine.manifest import STUDENT, TOKENIZER, newest_checkpoint
from megatron_vocagno.model.folder import ModelError, to_hugging_face


def export(run_dir: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the newest whole checkpoint of a run as a Hugging Face folder. Returns the checkpoint's folder.

    dtype: of the written weights; None keeps the checkpoint's. Raises RunError: no checkpoint, `out` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: exporting would mix two models. Remove it, or give another --out")
    checkpoint = newest_checkpoint(run_dir, lambda text: print(text, file=sys.stderr))
    if checkpoint is None:
        raise RunError(f"no whole checkpoint below {run_dir}: is it the 'output' folder of a run that has saved one?")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    state: dict[str, Tensor] = {}
    for file in sorted((checkpoint / STUDENT).glob("*.safetensors")):
        state |= load_file(file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint / TOKENIZER, local_files_only=True)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    to_hugging_face(config, state, out, dtype)
    tokenizer.save_pretrained(out)
    return checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 when the user has something to mend."""
    parser = argparse.ArgumentParser(description="Write a run's newest checkpoint as a Hugging Face folder.")
    parser.add_argument("run_dir", type=Path, help="the run's output folder")
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the written weights; default: as trained")
    options = parser.parse_args(arguments)
    try:
        checkpoint = export(options.run_dir, options.out, getattr(torch, options.dtype) if options.dtype else None)
    except (RunError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
