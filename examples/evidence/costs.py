"""The cost of a student: tokens, and floating-point operations by the usual rule.

Student: 6 N per token (forward and backward), with N its stored parameters and a tied head counted once.
Teacher: 2 N_T per token that it reads. If its losses are cached, it reads the training data once, before the first step, for any
number of epochs. Otherwise it reads as much text as the student at every step.
The products of attention itself are not counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from megatron_vocagno.config import Run
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.engine.manifest import checkpoint_folders
from megatron_vocagno.run_file import with_current_names
from megatron_vocagno.training.monitor import read_metrics


@dataclass(frozen=True)
class Cost:
    """Tokens and FLOPs up to a step."""

    student_tokens: int
    teacher_tokens: int
    student_flops: float
    teacher_flops: float


class Costs:
    """The costs of one run, step by step."""

    def __init__(self, output: Path) -> None:
        checkpoint = checkpoint_folders(output / "checkpoints")[0]
        run = Run.model_validate(with_current_names(json.loads((checkpoint / "run.json").read_text(encoding="utf-8")))[0])
        self.parameters = parameters(checkpoint / "student")
        self.student_tokens = {
            int(line["step"]): int(line["throughput/student_tokens"]) for line in read_metrics(output) if "loss/train" in line
        }
        self.teacher_parameters, self.read_before, self.read_along = 0, 0, 0.0
        if run.guidance.needs_teacher:
            teacher = run.teacher[0]
            self.teacher_parameters = parameters(teacher.path) if teacher.path else 0
            totals = [read_manifest(source.path).totals for source in run.data.train]
            whole = sum(part.teacher_tokens for part in totals)
            if teacher.placement == "cached":
                self.read_before = whole
            else:
                self.read_along = whole / sum(part.student_tokens for part in totals)

    def at(self, step: int) -> Cost:
        student = sum(tokens for number, tokens in self.student_tokens.items() if number <= step)
        teacher = self.read_before + round(self.read_along * student)
        return Cost(student, teacher, 6.0 * self.parameters * student, 2.0 * self.teacher_parameters * teacher)


def parameters(folder: Path) -> int:
    """Number of parameters in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118, it is not a mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total
