"""Token losses from hidden states and a head: precision, memory, and what is computed. tests/kernels holds their values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno.objective import linear_ce
from megatron_vocagno.objective.linear_ce import token_loss


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """128 columns, the narrowest tile: a small vocabulary has several tiles."""
    monkeypatch.setattr(linear_ce, "CPU_TILE_BYTES", 1)
    yield


def make(
    tokens: int, size: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 10_007 + size * 101 + vocabulary)
    hidden = torch.randn(tokens, size, generator=generator)
    head = torch.randn(vocabulary, size, generator=generator) * scale * size**-0.5
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) < 0.4)
    return hidden.to(dtype), head.to(dtype), target, weight


def dense(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    logits = hidden @ head.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="none")


def run(function, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = function(hidden, head, target)
    (loss * weight).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    return loss.detach(), hidden.grad, head.grad


SHAPES = [
    (1, 1, 1),
    (33, 17, 127),
    (64, 32, 128),
    (40, 48, 257),
    (16, 32, 8200),
]


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_exact_than_dense_torch_in_the_same_dtype(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, head, target, weight = make(*shape, dtype)
    truth = run(dense, hidden.double(), head.double(), target, weight.double())
    ours, theirs = run(token_loss, hidden, head, target, weight), run(dense, hidden, head, target, weight)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for name, true, mine, other in zip(("loss", "dhidden", "dhead"), truth, ours, theirs, strict=True):
        error, bar = ((x.double() - true).norm().item() for x in (mine, other))
        # a twelfth more, or the error of rounding alone (in 16 bits the result is rounded once, in 32 bits intermediate results
        # too), because neither way is always the more exact one
        low = name != "loss" and dtype != torch.float32
        floor = true.norm().item() * (torch.finfo(dtype).eps / 4 if low else torch.finfo(torch.float32).eps)
        assert error <= max(1.08 * bar, floor), f"{name}: {error:.2e} against {bar:.2e} of dense torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_inputs_are_float32_losses(dtype: torch.dtype) -> None:
    """Dense 16-bit logits are off by far more, which changes the ranking of tokens."""
    hidden, head, target, _ = make(256, 128, 8000, dtype)
    truth = dense(hidden.double(), head.double(), target)
    assert (token_loss(hidden, head, target) - truth).abs().max() < 1e-5
    assert (dense(hidden, head, target) - truth).abs().max() > 1e-3


@pytest.mark.usefixtures("narrow_tiles")
def test_ignored_targets_have_no_loss_and_no_gradient() -> None:
    hidden, head, target, weight = make(40, 16, 300, torch.float32)
    weight = weight + 0.1
    for index in (-100, -1, 7):
        ignored = torch.arange(40) % 3 == 0
        target[~ignored & (target == index)] += 1
        masked = target.masked_fill(ignored, index)
        loss, dhidden, dhead = run(
            lambda x, w, t, index=index: token_loss(x, w, t, ignore_index=index), hidden, head, masked, weight
        )
        _, want_dhidden, want_dhead = run(dense, hidden, head, target, weight * ~ignored)
        assert not loss[ignored].any() and not dhidden[ignored].any() and loss[~ignored].all()
        torch.testing.assert_close(dhidden, want_dhidden)
        torch.testing.assert_close(dhead, want_dhead)


def test_tokens_of_weight_zero_cost_nothing_and_leak_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward computes logits of the kept tokens only. A NaN hidden state of another token does not spread."""
    tokens: list[int] = []
    tiles = linear_ce._tiles
    monkeypatch.setattr(linear_ce, "_tiles", lambda hidden, head: tokens.append(len(hidden)) or tiles(hidden, head))
    hidden, head, target, weight = make(50, 16, 300, torch.float32)
    hidden[weight == 0] = torch.nan
    loss, dhidden, dhead = run(lambda *x: token_loss(*x).nan_to_num(), hidden, head, target, weight)
    assert tokens == [50, int((weight > 0).sum())] and 5 < tokens[1] < 45
    assert dhidden.isfinite().all() and dhead.isfinite().all() and not dhidden[weight == 0].any() and loss.isfinite().all()
    _, want, _ = run(dense, hidden.nan_to_num(), head, target, weight)
    torch.testing.assert_close(dhidden, want)


@pytest.mark.parametrize("trained", ["hidden", "head", "neither"])
def test_what_is_frozen_is_not_computed(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bool, ...]] = []
    gradients = linear_ce._gradients

    def watched(*args):
        result = gradients(*args)
        made.append(tuple(x is not None for x in result))
        return result

    monkeypatch.setattr(linear_ce, "_gradients", watched)
    hidden, head, target, weight = make(20, 16, 300, torch.float32)
    hidden.requires_grad_(trained == "hidden")
    head.requires_grad_(trained == "head")
    loss = token_loss(hidden, head, target)
    if trained == "neither":
        assert not loss.requires_grad
        return
    (loss * weight).sum().backward()
    assert made == [(trained == "hidden", trained == "head")]
    assert (hidden.grad is None, head.grad is None) == (trained != "hidden", trained != "head")


def test_nothing_as_wide_as_the_vocabulary_is_kept_or_made() -> None:
    """Logits would be far larger than a tile. No tensor of the forward or backward is larger than the tile or the head."""
    hidden, head, target, weight = make(2048, 8, 131_072, torch.float32)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() * x.element_size() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    saved: list[int] = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        run(token_loss, hidden, head, target, weight)
    assert len(sizes) > 100 and max(sizes) <= linear_ce.CPU_TILE_BYTES < 2048 * 131_072 * 4 // 60
    assert max(saved) == head.numel()


@pytest.mark.usefixtures("narrow_tiles")
def test_no_token_works() -> None:
    loss, dhidden, dhead = run(token_loss, *make(0, 16, 300, torch.float32))
    assert loss.shape == (0,) and dhidden.shape == (0, 16) and dhead.shape == (300, 16) and not dhead.any()
    _, dhidden, dhead = run(token_loss, *make(9, 16, 300, torch.bfloat16)[:3], torch.zeros(9))
    assert not dhidden.any() and not dhead.any()


def test_autocast_leaves_the_loss_in_float32() -> None:
    hidden, head, target, weight = make(64, 32, 500, torch.float32)
    plain = run(token_loss, hidden, head, target, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(token_loss, hidden, head, target, weight)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_equal_inputs_give_bitwise_equal_results() -> None:
    case = make(200, 64, 3000, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(token_loss, *case), run(token_loss, *case), strict=True))


def test_misfits_are_refused_with_both_values() -> None:
    hidden, head, target, _ = make(4, 8, 20, torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 8\].*\[20, 7\]"):
        token_loss(hidden, head[:, :7], target)
    with pytest.raises(ValueError, match=r"4 hidden states.*\[3\]"):
        token_loss(hidden, head, target[:3])
    with pytest.raises(ValueError, match=r"bfloat16: pass head\.to"):
        token_loss(hidden, head.bfloat16(), target)
    with pytest.raises(ValueError, match=r"\[2, 2, 8\].*flatten"):
        token_loss(hidden.view(2, 2, 8), head, target)
    with pytest.raises(ValueError, match="int64: expected float32"):
        token_loss(hidden.long(), head.long(), target)
    for other in (target.float(), target > 0):
        with pytest.raises(ValueError, match="integers of token ids"):
            token_loss(hidden, head, other)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="softcap"):
            token_loss(hidden, head, target, softcap=bad)
    for bad in (20, -1):
        target[2] = bad
        with pytest.raises(ValueError, match=f"target {bad} .* vocabulary of 20"):
            token_loss(hidden, head, target)


@pytest.mark.usefixtures("narrow_tiles")
def test_a_target_out_of_range_is_nan_where_it_cannot_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the check would wait for the device. The token must not be learned as if it were another one."""
    hidden, head, _, _ = make(5, 8, 300, torch.float32)
    monkeypatch.setattr(linear_ce, "_check_targets", lambda *_: None)
    loss = token_loss(hidden, head, torch.tensor([300, -1, 299, 10_000, 0]))
    assert loss.isnan().tolist() == [True, True, False, True, False]
