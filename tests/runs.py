"""Whole runs in processes of their own, small enough for tests, started as torchrun would start them."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset

REPOSITORY = Path(__file__).parent.parent
SCRIPT = "examples/pretrain_vocagno.py"
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}

SMALL_VOCABULARY, SMALL_TEACHER_VOCABULARY, SMALL_TEACHER_ROWS = 1_000, 500, 3_200
"""Tokens of both tokenizers of a small case, and rows of its teacher's embedding."""


def write_teacher(folder: Path, tokenizer: Path, scale: float = 1.0, vocab_size: int = 49_152) -> Path:
    """A random Qwen2, and a tokenizer beside it. scale: of its head; large is sure and wrong.

    vocab_size: rows of its embedding and of its head, SmolLM2's if not given
    """
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20 * scale)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_small_teacher(case: Case, folder: Path, scale: float) -> Path:
    """Another teacher of a small case."""
    return write_teacher(folder, case.tokenizer("teacher"), scale, SMALL_TEACHER_ROWS)


def write_settings(path: Path, **changes: Any) -> Path:
    settings = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    path.write_text(json.dumps(settings | changes))
    return path


@dataclass
class Case:
    """Everything that a run needs, in one folder."""

    folder: Path
    train: Path
    valid: Path
    teacher: Path
    student: dict[str, Any] = field(default_factory=lambda: dict(STUDENT))

    @classmethod
    def of(cls, folder: Path) -> Case:
        """The case that `build_case` has written into a folder."""
        return cls(folder, folder / "train" / "dataset", folder / "valid" / "dataset", folder / "teacher")

    def command(self, name: str, overrides: Sequence[str] = (), settings: dict[str, Any] | None = None) -> list[str]:
        """Arguments of examples/pretrain_vocagno.py for a run called `name`."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        path = folder / "run.toml"
        student = "\n".join(f"{key} = {json.dumps(value)}" for key, value in self.student.items())
        path.write_text(
            f'output = "{folder}/out"\n[data]\ntrain = "{self.train}"\nvalid = "{self.valid}"\nrow_length = 64\n'
            f'[student.config]\n{student}\n[teacher]\npath = "{self.teacher}"\ndtype = "float32"\ntokens_per_batch = 300\n'
            "[training]\nsteps = 5\n[training.schedule]\nwarmup_steps = 2\n[eval]\nrows = 12\n"
        )
        arguments = [str(path), "--deepspeed_config", str(write_settings(folder / "ds.json", **(settings or {})))]
        return arguments + [part for override in overrides for part in ("--set", override)]

    def tokenizer(self, side: str) -> Path:
        """The folder of a small case's tokenizer. side: student or teacher."""
        return self.folder / f"{side}_tokenizer"

    def out(self, name: str) -> Path:
        return self.folder / name / "out"

    def run(self, name: str, processes: int, overrides: Sequence[str] = (), settings: dict[str, Any] | None = None) -> Path:
        """A run to its end; its output folder."""
        finished = spawn(processes, self.command(name, overrides, settings))
        assert finished.returncode == 0, finished.stdout[-6000:]
        return self.out(name)


def build_case(folder: Path, teacher_tokenizer: Path) -> None:
    """Write the datasets and the teacher of a case: real vocabularies, and real text."""
    texts, mistral = real.texts(), real.mistral_tokenizer_path()
    build_dataset(folder / "train", texts[:60] + real.multilingual_texts(), mistral, teacher_tokenizer)
    build_dataset(folder / "valid", texts[60:70], mistral, teacher_tokenizer)
    write_teacher(folder / "teacher", teacher_tokenizer)


def build_small_case(folder: Path) -> Case:
    """The same with small vocabularies: a run takes a fraction of the time.

    The teacher's embedding is larger than its vocabulary. ZeRO-3 shards no tensor of less than 100,000 numbers.
    """
    texts = real.texts()
    student = real.trained_tokenizer_folder(folder / "student_tokenizer", SMALL_VOCABULARY, space=True)
    teacher = real.trained_tokenizer_folder(folder / "teacher_tokenizer", SMALL_TEACHER_VOCABULARY, bos=False)
    # paragraphs: rows of several documents
    paragraphs, held_out = ("\n\n".join(part).split("\n\n") for part in (texts[:24], texts[60:64]))
    build_dataset(folder / "train", paragraphs + real.multilingual_texts(), student, teacher)
    build_dataset(folder / "valid", held_out + real.multilingual_texts()[8:], student, teacher)
    write_teacher(folder / "teacher", teacher, vocab_size=SMALL_TEACHER_ROWS)
    return Case.of(folder)


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**variables: str) -> dict[str, str]:
    """One thread a process, on the CPU, with this Python first on the path: the launcher starts the first `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return (
        os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(free_port())} | variables
    )


def spawn(
    processes: int,
    arguments: Sequence[str],
    program: Sequence[str] = (SCRIPT,),
    folder: Path = REPOSITORY,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the training script on some ranks, as torchrun would start them. The ranks are forks of one process (forked.py).

    program: instead of the script, a file, ("-m", MODULE) or ("-c", TEXT), as Python takes them
    folder: where the ranks run
    fresh: in processes of their own, which import everything after they have their variables
    """
    shared = environment(WORLD_SIZE=str(processes), LOCAL_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
    with tempfile.NamedTemporaryFile("w+") as output:
        if fresh:
            code = _run_ranks(processes, [sys.executable, *program, *arguments], shared, output, folder)
            output.seek(0)
            return subprocess.CompletedProcess([*program, *arguments], code, output.read())
        request = {"processes": processes, "program": list(program), "arguments": list(arguments), "variables": shared}
        code = _ask_forks(json.dumps(request | {"output": output.name, "folder": str(folder)}))
        output.seek(0)
        return subprocess.CompletedProcess([*program, *arguments], code, output.read())


@functools.cache
def forks() -> tuple[IO[str], int]:
    """A connection to fork_server.py, which is started if it is not running, and the pid of the parent of its ranks."""
    name = f"forks-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    connection, server = socket.socket(socket.AF_UNIX), None
    while True:
        try:
            connection.connect(f"\0{name}")
            lines = connection.makefile("rw")
            return lines, int(lines.readline())
        except ConnectionRefusedError:
            if server is None:
                command = [sys.executable, "-m", "tests.fork_server", name]
                server = subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            time.sleep(0.1)


def spawn_each(
    ranks: Sequence[Sequence[str]],
    folders: Sequence[Path] = (),
    variables: Sequence[dict[str, str]] = (),
    patience: float = 90,
) -> tuple[list[int], str]:
    """Ranks that each have arguments of their own: all exit codes, and what they said. -9: one that hung for `patience` seconds.

    folders, variables: of each rank, where they differ.
    """
    shared = environment(WORLD_SIZE=str(len(ranks)), LOCAL_SIZE=str(len(ranks)), MASTER_ADDR="127.0.0.1")
    with tempfile.NamedTemporaryFile("w+") as output:
        requests = [
            {"arguments": list(arguments), "variables": shared | (variables[i] if variables else {}), "folder": str(folder)}
            for i, (arguments, folder) in enumerate(zip(ranks, folders or [REPOSITORY] * len(ranks), strict=True))
        ]
        codes = _ask_forks(json.dumps({"ranks": requests, "output": output.name, "patience": patience}))
        output.seek(0)
        return codes, output.read()


def _ask_forks(request: str) -> Any:
    lines, _ = forks()
    lines.write(request + "\n")
    lines.flush()
    return json.loads(lines.readline())


def _run_ranks(processes: int, command: Sequence[str], variables: dict[str, str], output: IO[str], folder: Path) -> int:
    """The exit code of the first rank that failed; the others are ended then."""
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        # before the others are ended: what a rank that failed, or died of a signal, left by itself
        failed = [code for rank in ranks if (code := rank.poll())]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    return failed[0] if failed else 0
