"""Steps whose loss or gradient is not finite: detect them, name the documents that they read, and stop after too many.

Outliers, which the engine skips, are described here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vocagno.errors import SharedError, tool

if TYPE_CHECKING:
    from megatron_vocagno.batch.blend import BlendedRows
    from megatron_vocagno.engine.outliers import Outlier


@dataclass(frozen=True)
class NonFiniteStep:
    """A step whose loss or gradient is not finite."""

    step: int
    loss: float
    grad_norm: float
    nonfinite_tokens: int
    skipped: bool
    """Whether DeepSpeed skipped the update. Otherwise the step was made without the tokens whose loss is not finite."""


class NonFiniteGuard:
    """Stops a run after `limit` broken steps in a row. DeepSpeed would skip such steps forever, with one log line per step."""

    def __init__(self, limit: int, skipped_steps: int) -> None:
        """skipped_steps: the number that DeepSpeed has counted so far, which a checkpoint restores."""
        self.limit, self.skipped, self.in_a_row = limit, skipped_steps, 0

    def check(self, step: int, numbers: Mapping[str, float]) -> NonFiniteStep | None:
        """The step if it is broken, else None. numbers: the metrics of the step."""
        loss, skipped = numbers["loss/train"], int(numbers["optimizer/skipped_steps"])
        grad_norm, tokens = numbers.get("optimizer/grad_norm", 0.0), int(numbers["loss/nonfinite_tokens"])
        broken = NonFiniteStep(step, loss, grad_norm, tokens, skipped != self.skipped)
        # tokens without a finite loss have no weight, so a student whose losses are all NaN has loss 0
        healthy = math.isfinite(loss) and math.isfinite(grad_norm) and not tokens and not broken.skipped
        self.skipped = skipped
        self.in_a_row = 0 if healthy else self.in_a_row + 1
        return None if healthy else broken

    def stop_at_limit(self, last: NonFiniteStep, log: Path) -> None:
        """Raises SharedError after `limit` broken steps in a row. last: the latest. log: the file that names their documents."""
        if self.in_a_row < self.limit:
            return
        raise SharedError(
            f"{self.in_a_row} steps in a row were not finite (training.max_nonfinite_steps), last step {last.step} "
            f"(loss {last.loss}, gradient norm {last.grad_norm}, {last.nonfinite_tokens} tokens without a finite loss).\n"
            "  The last checkpoint was written before them. Check:\n"
            "  - the steps before them, in metrics.jsonl. If the gradient norm grew, the learning rate is too high.\n"
            f"  - their documents, in {log}. If the same ones occur again, the text is broken "
            f"({tool('preprocess.show_document')} DATASET N shows one).\n"
            "  - the initial weights, if the first step failed, and with fp16 the initial loss scale."
        )


def documents_of(rows: BlendedRows, indices: range) -> list[list[int]]:
    """The numbers of the documents in some rows, ascending, one list per dataset of the blend."""
    documents: list[set[int]] = [set() for _ in rows.parts]
    for index in indices:
        part, pieces = rows.pieces(index)
        documents[part].update(piece.document for piece in pieces)
    return [sorted(part) for part in documents]


def describe(broken: NonFiniteStep, documents: Mapping[str, Sequence[int]], shown: int = 8) -> str:
    """One line for the user. It names at most `shown` documents per dataset, and counts the others."""
    action = "and was skipped" if broken.skipped else "and was made without the tokens that have no finite loss"
    return (
        f"step {broken.step} was not finite {action}: loss {broken.loss}, gradient norm {broken.grad_norm}, "
        f"{broken.nonfinite_tokens} tokens without a finite loss. {_documents_read(documents, shown)}"
    )


def describe_outlier(step: int, outlier: Outlier, count: int, documents: Mapping[str, Sequence[int]], shown: int = 8) -> str:
    """One line for the user about a step that was skipped. count: outliers so far. documents, shown: see describe."""
    return (
        f"step {step} was skipped as an outlier ({count} so far): loss {outlier.loss:.4g} (last {outlier.compared_steps} steps: "
        f"{outlier.loss_mean:.4g} ± {outlier.loss_std:.2g}), gradient norm {outlier.grad_norm:.4g} "
        f"({outlier.grad_norm_mean:.4g} ± {outlier.grad_norm_std:.2g}). {_documents_read(documents, shown)}"
    )


def _documents_read(documents: Mapping[str, Sequence[int]], shown: int) -> str:
    lists = [
        ", ".join(map(str, numbers[:shown]))
        + (f" and {len(numbers) - shown} more" if len(numbers) > shown else "")
        + f" of {path}"
        for path, numbers in documents.items()
        if numbers
    ]
    return f"It read documents {'; '.join(lists)}"
