"""Compare the losses of a 16-bit head with float64, and count the tokens that are selected differently. Runs on a CPU.

    python -m benchmarks.numerics [--write]

The inputs are 4,096 tokens with H = 256 and V = 32,000. Hidden states and head are rounded to bfloat16, and the logits have a
standard deviation of 3. The guide is the float64 loss of the same tokens under a head that differs by a tenth, as if two models
agreed on most tokens. 40 % of the tokens are kept by excess. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.page import PAGE, circumstances, write_section
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.objective.linear_ce import token_loss

N, H, V, KEPT = 4096, 256, 32_000, 1639


def losses() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses in float64, the guide in float64, and losses of each implementation by name."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).bfloat16()
    drawn, change = ((torch.randn(V, H, generator=generator) * 3 * H**-0.5) for _ in range(2))
    head, other = drawn.bfloat16(), (drawn + change / 10).bfloat16()
    target = torch.randint(0, V, (N,), generator=generator)
    true, guide = (F.cross_entropy(hidden.double() @ w.double().T, target, reduction="none") for w in (head, other))
    logits = hidden @ head.T
    options = torch.nn.LinearCrossEntropyOptions()
    return (
        true,
        guide,
        {
            "`token_loss`: bfloat16 factors, float32 logits": token_loss(hidden, head, target),
            "bfloat16 logits, float32 cross-entropy": F.cross_entropy(logits.float(), target, reduction="none"),
            "bfloat16 logits, bfloat16 cross-entropy": F.cross_entropy(logits, target, reduction="none"),
            "`F.linear_cross_entropy`": F.linear_cross_entropy(hidden, head, target, reduction="none", options=options),
        },
    )


def table() -> str:
    true, guide, found = losses()
    kept = set((true - guide).topk(KEPT).indices.tolist())
    head = f"| | largest error, nats | wrong tokens kept, of {KEPT:,} | distinct losses, of {N:,} |"
    lines = [head, "|---|---|---|---|"]
    for name, loss in found.items():
        others = set((loss.double() - guide).topk(KEPT).indices.tolist()) - kept
        error = (loss.double() - true).abs().max().item()
        lines.append(f"| {name} | {error:.0e} | {len(others)} | {len(set(loss.tolist())):,} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.numerics",
        "",
        "Compare the losses of a 16-bit head with float64, and count the tokens that are selected differently. Runs on a CPU.",
        "python -m benchmarks.numerics --write",
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    text = table()
    print(text)
    if options.write:
        write_section("numerics", f"`python -m benchmarks.numerics --write`, {circumstances('torch')}\n\n{text}", PAGE)


if __name__ == "__main__":
    sys.exit(main())
