"""Exports the newest complete checkpoint of a run as a Hugging Face folder: weights, configuration and tokenizer.

    python -m megatron_vocagno.export RUN_DIR --out HF_DIR

With `--average N`, the weights are the mean of the newest N complete checkpoints, in float32.
For a pretrained student, its tokenizer files, chat templates and generation settings are exported too. The command reads only
safetensors and JSON, and needs no engine: a checkpoint holds the student's weights under Hugging Face names for any number of
pipeline stages and any ZeRO stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vocagno.command import Parser, positive_int, run_command, started_as
from megatron_vocagno.errors import RunError, missing_path_hint

if TYPE_CHECKING:
    import torch


def export(run_dir: Path, out: Path, dtype: torch.dtype | None = None, average: int = 1) -> list[Path]:
    """Write the newest complete checkpoint of a run as a Hugging Face folder.

    dtype    type of the written weights; None keeps the type in the checkpoint
    average  number of checkpoints whose mean is written
    returns  the checkpoints that were read, newest first

    Raises RunError: there are fewer than `average` complete checkpoints, they are of different runs or students, or `out` is not
    empty.
    """
    # imported here, because torch takes seconds to import and the options are checked before
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from megatron_vocagno.engine.manifest import TOKENIZER, newest_checkpoints
    from megatron_vocagno.model.folder import to_hugging_face

    def print_note(text: str) -> None:
        print(text, file=sys.stderr)

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: exporting would mix two models. Remove it, or use another --out")
    checkpoints = newest_checkpoints(run_dir, average, print_note)
    if not checkpoints:
        hint = missing_path_hint(run_dir)
        raise RunError(f"no complete checkpoint in {run_dir}: is it the 'output' folder of a run that has saved one?{hint}")
    _check_average(run_dir, checkpoints, average)
    checkpoint = checkpoints[0]
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    state = _weights(checkpoint)
    if average > 1:
        dtype = dtype or next(iter(state.values())).dtype
        state = _mean_weights(checkpoints)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint / TOKENIZER, local_files_only=True)
    if tokenizer.eos_token_id not in _ids(config.eos_token_id):
        config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        to_hugging_face(config, state, folder, dtype)
        tokenizer.save_pretrained(folder)
        _add_companion_files(checkpoint, Path(folder), tokenizer, print_note)
        for file in sorted(Path(folder).iterdir()):
            file.rename(out / file.name)
    return checkpoints


def _check_average(run_dir: Path, checkpoints: Sequence[Path], average: int) -> None:
    """Raises RunError if there are fewer than `average` checkpoints, or if they are of different runs or students."""
    from megatron_vocagno.engine.manifest import read_manifest, step_of

    steps = ", ".join(str(step_of(folder)) for folder in checkpoints)
    if len(checkpoints) < average:
        raise RunError(
            f"--average is {average}, but {run_dir} has only {len(checkpoints)} complete "
            f"checkpoint{'s' * (len(checkpoints) != 1)} (step {steps}): use a smaller number.\n"
            "  checkpoint.keep_last in the run file sets how many checkpoints stay on disk."
        )
    newest, *others = [(folder, read_manifest(folder)) for folder in checkpoints]
    for folder, manifest in others:
        for name in ("dataset", "row_length", "seed", "bos"):
            now, before = getattr(newest[1].position, name), getattr(manifest.position, name)
            if now != before:
                raise RunError(
                    f"{newest[0]} and {folder} are of different runs ({name} {now} and {before}): their mean is not a model"
                )
        if manifest.layout.student != newest[1].layout.student:
            raise RunError(f"{newest[0]} and {folder} have different students (config.json): their weights have no mean")


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's weights in a checkpoint, by name."""
    from safetensors.torch import load_file

    from megatron_vocagno.engine.manifest import STUDENT

    state: dict[str, torch.Tensor] = {}
    for file in sorted((checkpoint / STUDENT).glob("*.safetensors")):
        state |= load_file(file)
    return state


def _mean_weights(checkpoints: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of the float32 weights of several checkpoints, by name. One checkpoint is read at a time."""
    mean = _float32_weights(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        for name, tensor in _float32_weights(checkpoint).items():
            mean[name] += tensor
    return {name: total.div_(len(checkpoints)) for name, total in mean.items()}


def _float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The master weights of a student that computes in 16 bits, else its weights."""
    from safetensors import safe_open

    from megatron_vocagno.engine.manifest import MASTER, OPTIMIZER

    state = {name: tensor.float() for name, tensor in _weights(checkpoint).items()}
    for path in sorted((checkpoint / OPTIMIZER).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file cannot be iterated
                name, _, part = key.rpartition(".")
                if part == MASTER:
                    state[name] = file.get_tensor(key)
    return state


def _add_companion_files(checkpoint: Path, folder: Path, tokenizer: Any, print_note: Callable[[str], None]) -> None:
    """Add the tokenizer files, chat templates and generation settings of a pretrained student, and set their EOS.

    tokenizer  as the dataset has it. Documents end with its EOS, so it becomes the EOS of the exported model
    """
    from megatron_vocagno.engine.manifest import PRETRAINED, RUN
    from megatron_vocagno.model.folder import carry_over

    pretrained = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))["student"]["pretrained"]
    if pretrained is None:
        return
    source = checkpoint / PRETRAINED
    if not source.is_dir():
        print_note(
            f"note: {checkpoint} has no chat template and no generation settings of {pretrained}: an older release wrote it, "
            "or that folder did not exist. Copy the files that the model needs."
        )
        return
    carried = carry_over(source, folder)
    if {"tokenizer.model", "tokenizer_config.json"} <= set(carried) and "tokenizer.json" not in carried:
        (folder / "tokenizer.json").unlink()  # else the folder would have two tokenizers
    _change(
        folder / "tokenizer_config.json", {"eos_token": tokenizer.eos_token}, lambda old: _content(old) == tokenizer.eos_token
    )
    eos = tokenizer.eos_token_id
    generation = folder / "generation_config.json"
    known = _ids(json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id"))
    _change(generation, {"eos_token_id": [*known, eos] if known else eos}, lambda old: eos in _ids(old))
    print_note(f"from {pretrained}: {', '.join(carried) if carried else 'no tokenizer, chat template or generation settings'}")


def _change(file: Path, fields: dict[str, Any], is_right: Callable[[Any], bool]) -> None:
    """Set the fields of a JSON file whose values are not right. Other fields are kept, and the file is only written if needed."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wrong = {name: value for name, value in fields.items() if not is_right(content.get(name))}
    if wrong:
        file.write_text(json.dumps(content | wrong, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    """The text of a token, which files hold as a string or as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: _export(options), "nothing was written")


def _export(options: argparse.Namespace) -> None:
    import torch

    from megatron_vocagno.engine.manifest import step_of

    dtype = getattr(torch, options.dtype) if options.dtype else None
    newest, *older = export(options.run_dir, options.out, dtype, options.average)
    if older:
        steps = ", ".join(str(step_of(folder)) for folder in (*reversed(older), newest))
        print(f"mean of {1 + len(older)} checkpoints of {options.run_dir}, steps {steps} -> {options.out}")
    else:
        print(f"{newest} -> {options.out}")


def parser() -> Parser:
    prog = started_as("vocagno-export", "python -m megatron_vocagno.export")
    parser = Parser(
        prog,
        "RUN_DIR --out HF_DIR",
        "Write the newest complete checkpoint of a run as a Hugging Face folder: weights, configuration, tokenizer.",
        f"{prog} runs/mine --out runs/mine-hf --dtype bfloat16",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's output folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="HF_DIR", help="the folder to write; must not exist or be empty (required)"
    )
    parser.add_argument(
        "--average",
        type=positive_int,
        default=1,
        metavar="N",
        help="write the mean of the newest N checkpoints, computed in float32 (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights (default: as trained)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
