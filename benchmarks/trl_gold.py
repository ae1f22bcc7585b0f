"""TRL's GOLD as an arm of `benchmarks.step`, run by the interpreter of a separate environment in which trl is installed.

    PYTHON -m benchmarks.trl_gold STUDENT TEACHER TEXTS ROWS STEPS SCRATCH

The process takes a step for each line that it reads, and writes a line for each step: seconds and memory. The trainer is TRL's,
with its data loading, collation and loop. Only the waiting and the clock are added, in a callback.

GOLD (General Online Logit Distillation) compares the student's complete distribution with the teacher's. Here it is off-policy
(`lmbda = 0`: nothing is generated) with positional ULD (`use_extended_uld = False`): both distributions of every position are
sorted, and the loss is their L1 distance, position i against position i. This is its cheapest mode for two vocabularies. Its
extended mode requires two byte-level tokenizers, and Mistral's is not byte-level.

The two steps are comparable in: weights of both models, texts, rows per batch, float32, AdamW, one thread, no clipping, no
activation checkpointing, CPU time from the start to the end of a step, memory in addition to that before the first step. They
are not comparable in their objective: GOLD learns from every token, with another loss. GOLD also tokenizes for the teacher
within the step, which costs milliseconds, and orders the texts differently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import step_memory

MARK = "step:"
"""Prefix of the lines for the parent process. The trainer writes other lines."""


class Gold:
    """The arm that `benchmarks.step` drives."""

    def __init__(self, python: str, student: Path, teacher: Path, texts: list[str], rows: int, steps: int) -> None:
        scratch = student.with_name("gold")
        scratch.mkdir()
        file = scratch / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.trl_gold", *map(str, (student, teacher, file, rows, steps, scratch))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.bytes = 0.0

    def step(self, k: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                seconds, self.bytes = map(float, line.removeprefix(MARK).split())
                return seconds
        raise RuntimeError(f"TRL's GOLD exited before step {k}: see its output above")

    def growth(self) -> float:
        return self.bytes

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main(student: str, teacher: str, texts: str, rows: int, steps: int, scratch: str) -> None:
    import torch
    from datasets import Dataset  # type: ignore[import-not-found]
    from transformers import TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer  # type: ignore[import-not-found]

    class Clock(TrainerCallback):  # type: ignore[misc]
        before: int | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = self.before or step_memory.start()
            if not sys.stdin.readline():
                sys.exit("the parent process has closed the pipe")
            self.begin = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            print(MARK, time.process_time() - self.begin, step_memory.peak() - (self.before or 0), flush=True)

    torch.set_num_threads(1)
    config = GOLDConfig(
        output_dir=scratch,
        lmbda=0.0,
        use_uld_loss=True,
        use_extended_uld=False,
        max_length=1024,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=1e-4,
        optim="adamw_torch",
        max_grad_norm=0.0,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    examples = [halves(text) for text in json.loads(Path(texts).read_text(encoding="utf-8"))]
    trainer = GOLDTrainer(student, teacher, config, train_dataset=Dataset.from_list(examples), callbacks=[Clock()])
    for model in (trainer.model, trainer.teacher_model):
        for weight in model.parameters():
            weight.detach().sum()  # only the pages of a mapped file that were read count as memory
    trainer.train()


def halves(text: str) -> dict[str, str]:
    """Split a text for GOLD, which requires a prompt: the prompt is the first word."""
    cut = text.find(" ", 1)
    return {"prompt": text[:cut], "completion": text[cut:]}


if __name__ == "__main__":
    student, teacher, texts, rows, steps, scratch = sys.argv[1:]
    main(student, teacher, texts, int(rows), int(steps), scratch)
