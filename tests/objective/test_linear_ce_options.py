"""Token losses with a softcap, with selected tokens, with tied weights and with recomputed layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vocagno.compat import product_precision
from megatron_vocagno.objective import linear_ce
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from tests.objective.test_linear_ce import dense, make, narrow_tiles, run

__all__ = ["narrow_tiles"]


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_are_those_of_finite_differences(softcap: float | None) -> None:
    hidden, head, target, weight = (x.double() if x.is_floating_point() else x for x in make(5, 3, 130, torch.float32))
    target[3] = -100
    weight += 0.1
    assert torch.autograd.gradcheck(
        lambda x, w: token_loss(x, w, target, softcap=softcap) * weight, (hidden.requires_grad_(), head.requires_grad_())
    )


def backward_with(tokens: Tensor | None, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor):
    """tokens: set between forward and backward. None: nothing is set."""
    hidden, head, selected = hidden.clone().requires_grad_(), head.clone().requires_grad_(), SelectedTokens()
    loss = token_loss(hidden, head, target, selected=selected)
    if tokens is not None:
        selected.set(tokens)
    torch.where(weight > 0, loss * weight, 0.0).sum().backward()
    return hidden.grad, head.grad


@pytest.mark.usefixtures("narrow_tiles")
def test_selected_tokens_give_the_gradients_of_a_backward_that_reads_them() -> None:
    """A GPU's list is filled up to a length that is known in advance with tokens that are not learned, of any values."""
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    hidden[weight == 0] = torch.nan
    read = backward_with(None, hidden, head, target, weight)
    learned, spare = (weight > 0).nonzero().squeeze(1), (weight == 0).nonzero().squeeze(1)
    for more in (0, 1, len(spare)):
        given = backward_with(torch.cat([learned, spare[:more]]), hidden, head, target, weight)
        for mine, want in zip(given, read, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, want)


def test_only_the_selected_tokens_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    tiles = linear_ce._tiles
    monkeypatch.setattr(linear_ce, "_tiles", lambda hidden, head: counts.append(len(hidden)) or tiles(hidden, head))
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    tokens = torch.cat([weight.nonzero().squeeze(1), (weight == 0).nonzero().squeeze(1)[:3]])
    backward_with(tokens, hidden, head, target, weight)
    assert counts == [60, len(tokens)] and len(tokens) < 40


def test_wrong_selected_tokens_are_refused() -> None:
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    tokens = weight.nonzero().squeeze(1)
    with pytest.raises(ValueError, match=r"2 tokens have a gradient.* 0 selected"):
        backward_with(tokens[2:], hidden, head, target, weight)
    with pytest.raises(ValueError, match=r"1 tokens have a gradient.* 1 selected"):
        backward_with(torch.cat([tokens[1:], tokens[1:2]]), hidden, head, target, weight)
    for bad in (tokens.int(), weight > 0, tokens[None]):
        with pytest.raises(ValueError, match="int64, got"):
            SelectedTokens().set(bad)


@pytest.mark.usefixtures("narrow_tiles")
def test_a_tied_head_gets_both_gradients() -> None:
    _, head, target, weight = make(40, 16, 300, torch.float32)
    ids = torch.arange(40) * 7 % 300

    def gradient(function) -> Tensor:
        shared = head.clone().requires_grad_()
        (function(F.embedding(ids, shared).tanh(), shared, target) * weight).sum().backward()
        assert shared.grad is not None
        return shared.grad

    ours = gradient(token_loss)
    torch.testing.assert_close(ours, gradient(dense))
    for part in (lambda x, w, t: token_loss(x.detach(), w, t), lambda x, w, t: token_loss(x, w.detach(), t)):
        assert (ours - gradient(part)).abs().max() > 1e-3, "one of the two gradients is missing"


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_change_nothing(reentrant: bool) -> None:
    """The loss is within the recomputed part, and the tokens are selected after its first forward."""
    hidden, head, target, weight = make(40, 16, 300, torch.float32)
    layer = nn.Linear(16, 16)

    def gradients(recompute: bool) -> list[Tensor]:
        x, w, selected = hidden.clone().requires_grad_(), head.clone().requires_grad_(), SelectedTokens()

        def part(x: Tensor, w: Tensor) -> Tensor:
            return token_loss(layer(x), w, target, selected=selected)

        loss = checkpoint(part, x, w, use_reentrant=reentrant) if recompute else part(x, w)
        selected.set(weight.nonzero().squeeze(1))
        return list(
            torch.autograd.grad((loss * weight).sum(), [x, w]) if not (recompute and reentrant) else reentrant_grad(loss, x, w)
        )

    def reentrant_grad(loss: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
        (loss * weight).sum().backward()
        assert x.grad is not None and w.grad is not None
        return [x.grad, w.grad]

    for mine, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mine, want) and want.any()


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    matmul = product_precision()
    if matmul is None:
        pytest.skip("torch before 2.9 has no such switch")
    before = matmul.fp32_precision
    case = make(64, 32, 500, torch.bfloat16)
    run(token_loss, *case)
    assert matmul.fp32_precision == before
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    assert ((left @ right).double() - left.double() @ right.double()).abs().max() < 1e-4
    matmul.fp32_precision = "ieee"
    run(token_loss, *case)
    assert matmul.fp32_precision == "ieee"
    matmul.fp32_precision = before
