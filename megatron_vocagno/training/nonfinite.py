"""Steps that are not finite: which they were, what they read, and when there have been too many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vocagno.batch.blend import BlendedRows
from megatron_vocagno.errors import SharedError, tool


@dataclass(frozen=True)
class BrokenStep:
    """A step whose loss or gradient is not finite."""

    step: int
    loss: float
    grad_norm: float
    nonfinite_tokens: int
    skipped: bool
    """DeepSpeed left the weights alone; else the tokens without a finite loss alone were left out."""


class NonFiniteGuard:
    """Stops a run whose loss or gradient stays broken: DeepSpeed skips such steps with no more than a line, for ever."""

    def __init__(self, limit: int, skipped_steps: int) -> None:
        """skipped_steps: those that DeepSpeed has counted so far; a resumed run remembers them."""
        self.limit, self.skipped, self.in_a_row = limit, skipped_steps, 0

    def check(self, step: int, numbers: Mapping[str, float]) -> BrokenStep | None:
        """None for a healthy step; a checkpoint waits until there is one."""
        loss, skipped = numbers["loss/train"], int(numbers["optimizer/skipped_steps"])
        grad_norm, tokens = numbers.get("optimizer/grad_norm", 0.0), int(numbers["loss/nonfinite_tokens"])
        broken = BrokenStep(step, loss, grad_norm, tokens, skipped != self.skipped)
        # tokens without a finite loss carry no weight, so a student that is all NaN has loss 0
        healthy = math.isfinite(loss) and math.isfinite(grad_norm) and not tokens and not broken.skipped
        self.skipped = skipped
        self.in_a_row = 0 if healthy else self.in_a_row + 1
        return None if healthy else broken

    def stop_at_limit(self, last: BrokenStep, log: Path) -> None:
        """Raises SharedError after `limit` broken steps in a row. log: where their documents are named."""
        if self.in_a_row < self.limit:
            return
        raise SharedError(
            f"{self.in_a_row} steps in a row were not finite (training.max_nonfinite_steps), last step {last.step} "
            f"(loss {last.loss}, gradient norm {last.grad_norm}, {last.nonfinite_tokens} tokens without a finite loss).\n"
            "  The last checkpoint is from before them. Look at:\n"
            f"  - the steps before, in metrics.jsonl: a gradient norm that grew says that the learning rate is too high;\n"
            f"  - their documents, in {log}: the same ones again say that the text is broken "
            f"({tool('preprocess.show_document')} DATASET N shows one);\n"
            "  - the weights, where the first step was broken already; and with fp16 its first loss scale."
        )


def documents_of(rows: BlendedRows, indices: range) -> list[list[int]]:
    """For each dataset of the blend the documents that some rows hold, ascending."""
    documents: list[set[int]] = [set() for _ in rows.parts]
    for index in indices:
        part, pieces = rows.pieces(index)
        documents[part].update(piece.document for piece in pieces)
    return [sorted(part) for part in documents]


def described(broken: BrokenStep, documents: Mapping[str, Sequence[int]], shown: int = 8) -> str:
    """One line for a person; of many documents only the first few of each dataset."""
    what = "and was skipped" if broken.skipped else "and was taken without the tokens that have no finite loss"
    lists = [
        ", ".join(map(str, numbers[:shown]))
        + (f" and {len(numbers) - shown} more" if len(numbers) > shown else "")
        + f" of {path}"
        for path, numbers in documents.items()
        if numbers
    ]
    return (
        f"step {broken.step} was not finite {what}: loss {broken.loss}, gradient norm {broken.grad_norm}, "
        f"{broken.nonfinite_tokens} tokens without a finite loss. It read documents {'; '.join(lists)}"
    )
