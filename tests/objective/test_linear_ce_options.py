"""Token losses with a softcap, a z-loss, rows told by a selection, tied weights and recomputed layers; in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vocagno.objective import linear_ce
from megatron_vocagno.objective.linear_ce import LearnedRows, token_loss
from tests.objective.test_linear_ce import make, narrow_tiles, run

__all__ = ["narrow_tiles"]


def dense(
    hidden: Tensor, head: Tensor, target: Tensor, softcap: float | None = None, z_loss: float = 0.0, ignore_index: int = -100
) -> Tensor:
    """What token_loss promises, from whole logits in the dtype given."""
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    return loss + (z_loss * logits.logsumexp(1) ** 2).masked_fill(target == ignore_index, 0.0)


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (4.0, 0.0), (None, 1e-2), (30.0, 1e-2)])
def test_gradients_are_those_of_finite_differences(softcap: float | None, z_loss: float) -> None:
    hidden, head, target, weight = (x.double() if x.is_floating_point() else x for x in make(7, 5, 300, torch.float32))
    target[3] = -100
    weight += 0.1
    assert torch.autograd.gradcheck(
        lambda x, w: token_loss(x, w, target, softcap=softcap, z_loss=z_loss) * weight,
        (hidden.requires_grad_(), head.requires_grad_()),
    )


@pytest.mark.usefixtures("narrow_tiles")
def test_softcap_and_z_loss_are_as_exact_as_dense_torch() -> None:
    met = 0
    for softcap, z_loss, shape in itertools.product(
        (None, 2.0, 30.0), (0.0, 1e-3, 0.3), ((33, 17, 127), (65, 31, 129), (40, 48, 257))
    ):
        hidden, head, target, weight = make(*shape, torch.float32)
        target[::5] = -100
        ours = run(lambda *x, s=softcap, z=z_loss: token_loss(*x, softcap=s, z_loss=z), hidden, head, target, weight)
        theirs = run(lambda *x, s=softcap, z=z_loss: dense(*x, s, z), hidden, head, target, weight)
        truth = run(lambda *x, s=softcap, z=z_loss: dense(*x, s, z), hidden.double(), head.double(), target, weight.double())
        for true, mine, other in zip(truth, ours, theirs, strict=True):
            error, bar = ((x.double() - true).norm().item() for x in (mine, other))
            assert error <= max(2 * bar, true.norm().item() * torch.finfo(torch.float32).eps), (softcap, z_loss, shape)
            met += 1
    assert met == 81


def test_a_softcap_must_be_above_zero() -> None:
    hidden, head, target, _ = make(4, 8, 20, torch.float32)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="softcap"):
            token_loss(hidden, head, target, softcap=bad)


def backward_with(rows: LearnedRows | None, told: Tensor | None, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = token_loss(hidden, head, target, rows=rows)
    if rows is not None and told is not None:
        rows.tell(told)
    torch.where(weight > 0, loss * weight, 0.0).sum().backward()
    return hidden.grad, head.grad


@pytest.mark.usefixtures("narrow_tiles")
def test_told_rows_give_the_gradients_of_asked_ones_and_may_name_more() -> None:
    """A GPU's list is filled up to a length known beforehand, with rows that are not learned, whatever those hold."""
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    hidden[weight == 0] = torch.nan
    asked = backward_with(None, None, hidden, head, target, weight)
    learned = (weight > 0).nonzero().squeeze(1)
    spare = (weight == 0).nonzero().squeeze(1)
    for more in (0, 1, len(spare)):
        told = backward_with(LearnedRows(), torch.cat([learned, spare[:more]]), hidden, head, target, weight)
        for mine, want in zip(told, asked, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, want)
    never_told = backward_with(LearnedRows(), None, hidden, head, target, weight)
    assert all(torch.equal(a, b) for a, b in zip(never_told, asked, strict=True))


def test_only_the_rows_told_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    tiles = linear_ce._tiles
    monkeypatch.setattr(linear_ce, "_tiles", lambda hidden, head: counts.append(len(hidden)) or tiles(hidden, head))
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    told = torch.cat([weight.nonzero().squeeze(1), (weight == 0).nonzero().squeeze(1)[:3]])
    backward_with(LearnedRows(), told, hidden, head, target, weight)
    assert counts == [60, len(told)] and len(told) < 40


def test_rows_told_wrongly_are_refused() -> None:
    hidden, head, target, weight = make(60, 16, 300, torch.float32)
    told = weight.nonzero().squeeze(1)
    with pytest.raises(ValueError, match="2 rows have a gradient"):
        backward_with(LearnedRows(), told[2:], hidden, head, target, weight)
    with pytest.raises(ValueError, match="1 are repeated; 1 rows have a gradient"):
        backward_with(LearnedRows(), torch.cat([told[1:], told[1:2]]), hidden, head, target, weight)
    for bad in (told.int(), weight > 0, told[None]):
        with pytest.raises(ValueError, match="int64 expected"):
            LearnedRows().tell(bad)


@pytest.mark.usefixtures("narrow_tiles")
def test_a_tile_of_minus_infinity_adds_nothing() -> None:
    hidden, head, target, _ = make(20, 1, 300, torch.float32)
    hidden = hidden.abs() + 0.1
    for begin in (0, 128, 256):
        masked = head.clone()
        masked[begin : begin + 128] = -torch.inf
        loss = token_loss(hidden, masked, target)
        lost = (target >= begin) & (target < begin + 128)
        assert loss[lost].isinf().all() and loss[~lost].isfinite().all() and lost.any()
        torch.testing.assert_close(loss[~lost], dense(hidden, masked, target)[~lost])


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
        assert (ours - gradient(part)).abs().max() > 1e-3, "one of the two gradients is nothing"


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_change_nothing(reentrant: bool) -> None:
    """The loss itself within the recomputed part, with rows that are told after its first forward."""
    hidden, head, target, weight = make(40, 16, 300, torch.float32)
    layer = nn.Linear(16, 16)

    def gradients(recompute: bool) -> list[Tensor]:
        x, w, rows = hidden.clone().requires_grad_(), head.clone().requires_grad_(), LearnedRows()

        def part(x: Tensor, w: Tensor) -> Tensor:
            return token_loss(layer(x), w, target, rows=rows)

        loss = checkpoint(part, x, w, use_reentrant=reentrant) if recompute else part(x, w)
        rows.tell(weight.nonzero().squeeze(1))
        return list(
            torch.autograd.grad((loss * weight).sum(), [x, w]) if not (recompute and reentrant) else reentrant_grad(loss, x, w)
        )

    def reentrant_grad(loss: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
        (loss * weight).sum().backward()
        assert x.grad is not None and w.grad is not None
        return [x.grad, w.grad]

    for mine, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mine, want) and want.any()


@pytest.mark.usefixtures("narrow_tiles")
def test_a_head_with_more_rows_than_the_tokenizer_has_ids_is_a_head_like_any_other() -> None:
    """Rows that pad a vocabulary take part in the softmax, as in Hugging Face's own loss, and get their gradient."""
    hidden, head, target, weight = make(40, 16, 384, torch.float32)
    target = target % 300
    for mine, want in zip(run(token_loss, hidden, head, target, weight), run(dense, hidden, head, target, weight), strict=True):
        torch.testing.assert_close(mine, want)
        assert mine.abs().sum() > 0


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    matmul = torch.backends.mkldnn.matmul
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
