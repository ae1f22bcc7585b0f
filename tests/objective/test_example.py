"""The example that docs/performance.md opens with, run as it stands there."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runs import REPOSITORY

B, S, U, H, V, TEACHER_V = 3, 20, 31, 8, 50, 70


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    first_BS = integers(U - 3, B, S)
    return {
        "hidden_NH": normal(B * S, H).requires_grad_(),
        "head_VH": normal(V, H).requires_grad_(),
        "target_N": integers(V, B * S),
        "teacher_hidden_NH": normal(B * U, H),
        "teacher_head_VH": normal(TEACHER_V, H),
        "teacher_target_N": integers(TEACHER_V, B * U),
        "first_BS": first_BS,
        "last_BS": first_BS + integers(4, B, S),
        "valid_BS": integers(10, B, S) > 0,
    }


def test_the_example_of_the_page_learns_the_tokens_that_the_method_keeps() -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    x = tensors()
    exec(example, {"torch": torch, "B": B, "S": S, "U": U, **x})

    wide = {name: x[name].detach().double().requires_grad_() for name in ("hidden_NH", "head_VH")}
    loss_N = F.cross_entropy(wide["hidden_NH"] @ wide["head_VH"].T, x["target_N"], reduction="none")
    teacher_N = F.cross_entropy(x["teacher_hidden_NH"] @ x["teacher_head_VH"].T, x["teacher_target_N"], reduction="none")
    excess, learned = {}, []
    for n, (first, last) in enumerate(zip(x["first_BS"].flatten().tolist(), x["last_BS"].flatten().tolist(), strict=True)):
        if x["valid_BS"].flatten()[n] and first == last:
            learned.append(n)
        elif x["valid_BS"].flatten()[n]:
            row = n // S * U
            excess[n] = float(loss_N[n].detach() - teacher_N[row + first : row + last].max())
    unmapped = len(learned)
    learned += sorted(excess, key=lambda n: -excess[n])[: -(-len(excess) * 2 // 5)]
    assert 5 < unmapped < len(learned) - 10 < B * S
    loss_N[learned].mean().backward()
    for name, true in wide.items():
        torch.testing.assert_close(x[name].grad.double(), true.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
