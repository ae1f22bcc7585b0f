"""The method inside transformers' Trainer: continue to train a small model under a teacher with another vocabulary.

    python examples/with_hf_trainer.py

`GuidedTrainer` is the method. Copy it into your own code. docs/reference.md explains it. The rest of the file reads a corpus and
starts a training. B texts, S student positions, U teacher positions. Losses are in nats.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_vocagno.command import Parser, positive_int, run_command
from megatron_vocagno.corpus import open_tokenizer
from megatron_vocagno.errors import UserError
from megatron_vocagno.integrations.text_collator import TextCollator
from megatron_vocagno.model.folder import carry_over, model_folder
from megatron_vocagno.model.teacher import Teacher, open_teacher
from megatron_vocagno.objective import Rule, guided_loss, planned_kept, summarize


class GuidedTrainer(Trainer):
    """Gives weights to tokens by a rule, and logs the share of the mapped tokens with weight and their mean weight."""

    loss_is_scaled_for_ga = True  # by get_batch_samples

    def __init__(self, *args: Any, teacher: Teacher, rule: Rule | None = None, **kwargs: Any) -> None:
        """rule: by default the paper's. The others as for Trainer. data_collator must be a TextCollator with the rule's unit."""
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.rule = rule or Rule()
        if self.data_collator.unit != self.rule.unit:
            raise ValueError(f"the rule has unit {self.rule.unit!r}: pass TextCollator(..., unit={self.rule.unit!r})")
        self.stats: list[Tensor] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The guided loss of a micro-batch, as a part of its step's; in evaluation, the micro-batch's own."""
        labels_BS = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        loss_BS = cross_entropy(outputs.logits.float().transpose(1, 2), labels_BS, reduction="none")
        teacher_loss_BU = self.teacher.loss(inputs["teacher_input_ids"], inputs["teacher_labels"])
        guided = guided_loss(
            loss_BS,
            teacher_loss_BU,
            inputs["first"],
            inputs["last"],
            labels_BS != -100,
            **vars(self.rule),
            # in evaluation, the Trainer counts all labels instead of those that are kept
            normalizer=num_items_in_batch if model.training else None,
        )
        if model.training:
            self.stats.append(guided.stats.cpu())
        return (guided.loss, outputs) if return_outputs else guided.loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and what each of their losses is divided by: the planned sum of the step's weights."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        planned = torch.tensor(float(sum(map(self._planned, batches))), device=device)
        return batches, self.accelerator.reduce(planned, "mean")  # several GPUs take the mean of their gradients

    def _planned(self, batch: dict[str, Tensor]) -> int:
        mapped_BS = batch["first"] < batch["last"]
        unmapped_BS = (batch["labels"] != -100) & ~mapped_BS
        return planned_kept(mapped_BS.sum(1).tolist(), unmapped_BS.sum(1).tolist(), self.rule)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds share_kept, share_unmapped and weight since the last call. With several ranks, those of this rank."""
        means = summarize(*self.stats)
        shares = {name: round(means[name], 4) for name in ("share_kept", "share_unmapped", "weight") if name in means}
        self.stats.clear()
        super().log(logs | shares, *args, **kwargs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, see megatron_vocagno.command."""
    parser = Parser(
        "python examples/with_hf_trainer.py",
        "",
        "Continue a model with transformers' Trainer, under a teacher; by default on what `make demo` left, in a minute.",
        "python examples/with_hf_trainer.py --student S --teacher T --corpus texts.jsonl --steps 1000",
    )
    parser.add_argument("--student", default=".demo/student-hf", help="Hugging Face folder (default: .demo/student-hf)")
    parser.add_argument("--teacher", default=".demo/teacher", help="Hugging Face folder (default: .demo/teacher)")
    parser.add_argument(
        "--corpus", type=Path, default=".demo/corpus/train.jsonl", help='lines of {"text": …} (default: .demo/corpus/train.jsonl)'
    )
    parser.add_argument("--out", type=Path, default="runs/hf-trainer", help="folder to save in (default: runs/hf-trainer)")
    parser.add_argument("--steps", type=positive_int, default=5, help="optimizer steps of 2 x 4 texts (default: 5)")
    parser.add_argument("--length", type=positive_int, default=128, help="most student tokens of a text (default: 128)")
    options = parser.parse_args(arguments)
    return run_command(lambda: train(**vars(options)))


def train(student: str, teacher: str, corpus: Path, out: Path, steps: int, length: int) -> None:
    """Prints loss and share kept of every step. Raises UserError, OSError."""
    folder = model_folder(student)
    tokenizer = open_tokenizer(folder)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,  # the collator makes the columns, out of texts
    )
    trainer = GuidedTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        arguments,
        data_collator=TextCollator(tokenizer, open_tokenizer(teacher), length),
        train_dataset=read_texts(corpus),
        teacher=open_teacher(teacher, torch.float32, arguments.device),
    )
    trainer.train()
    trainer.save_model(str(out))
    tokenizer.save(out)
    carry_over(folder, out)  # its chat template, among others


def read_texts(corpus: Path) -> list[dict[str, str]]:
    """Raises UserError: a line is not JSON with a text."""
    texts = []
    with corpus.open("rb") as lines:  # of bytes: str.splitlines also cuts at U+2028, which JSON may hold
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                str(text).encode()  # refuses half a character, "\\ud800"
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{corpus}, line {number}: not JSON with a "text": {error!r}') from None
            if not isinstance(text, str):
                raise UserError(f'{corpus}, line {number}: "text" is not a string: {text!r:.80}')
            texts.append({"text": text})
    return [row for row in texts if row["text"]]


if __name__ == "__main__":
    sys.exit(main())
