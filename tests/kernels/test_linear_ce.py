"""The kernels of linear cross-entropy against dense logits in float64 and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno.objective.linear_ce_triton import dlogits_tile, fold_tile, fused_softmax
from tests.kernels import HALVES

CAPS = [None, 5.0]


def capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def logits(rows: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    return (torch.randn(rows, columns, generator=generator) * 4).to(device)


def start(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """peak, sum and picked before the first tile."""
    return tuple(torch.full((rows,), value, device=device) for value in (-torch.inf, 0.0, torch.nan))


def fold(x_NV: Tensor, target_N: Tensor, width: int, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """All tiles, each a view whose rows lie V apart."""
    state = start(len(x_NV), x_NV.device)
    for begin in range(0, x_NV.shape[1], width):
        fold_tile(x_NV[:, begin : begin + width], begin, target_N, *state, softcap)
    return state


def assert_softmax(state: tuple[Tensor, Tensor, Tensor], x_NV: Tensor, target_N: Tensor, softcap: float | None) -> None:
    """peak + log(sum) and picked are those of float64, but for rounding at the scale of the logits."""
    peak_N, sum_N, picked_N = (x.double() for x in state)
    z_NV = capped(x_NV.double(), softcap)
    torch.testing.assert_close(peak_N, z_NV.amax(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(peak_N + sum_N.log(), z_NV.logsumexp(1), rtol=1e-6, atol=3e-6)
    met_N = (target_N >= 0) & (target_N < x_NV.shape[1])
    want_N = z_NV.gather(1, target_N.clamp(0, x_NV.shape[1] - 1)[:, None]).squeeze(1)
    torch.testing.assert_close(picked_N, torch.where(met_N, want_N, torch.nan), rtol=1e-6, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (511, 511), (512, 512), (513, 513), (700, 300), (1100, 600), (96, 32)])
def test_folded_tiles_are_the_softmax_of_the_row(columns: int, width: int, softcap: float | None, device: torch.device) -> None:
    """Even and ragged tiles, narrower and wider than what a program holds at a time."""
    x_NV = logits(7, columns, device)
    target_N = torch.arange(7, device=device) * (columns // 7) + columns % 7
    target_N[5:] = torch.tensor([-100, columns])  # no tile holds these
    assert_softmax(fold(x_NV, target_N, width, softcap), x_NV, target_N, softcap)


def test_every_target_is_met_in_its_own_tile_and_in_no_other(device: torch.device) -> None:
    """A column that only pads a tile carries the number of a column of the next one."""
    columns, width = 130, 50
    target_N = torch.arange(-2, columns + 70, device=device)
    x_NV = logits(1, columns, device).expand(len(target_N), columns)
    picked_N = torch.full((len(target_N),), torch.nan, device=device)
    met = 0
    for begin in range(0, columns, width):
        before_N = picked_N.clone()
        peak_N, sum_N, _ = start(len(target_N), device)
        end = min(begin + width, columns)
        fold_tile(x_NV[:, begin:end], begin, target_N, peak_N, sum_N, picked_N, None)
        mine_N = (target_N >= begin) & (target_N < end)
        assert torch.equal(picked_N[mine_N], x_NV[0, begin:end])
        assert torch.equal(picked_N[~mine_N].nan_to_num(), before_N[~mine_N].nan_to_num())
        met += int(mine_N.sum())
    assert met == columns


def test_extreme_logits_neither_overflow_nor_are_lost(device: torch.device) -> None:
    target_N = torch.tensor([0, 99, 100, 299], device=device)
    met = 0
    for place, height in itertools.product([0, 99, 100, 299], [1e4, -1e4, 88.0, 3e38, -torch.inf]):
        x_NV = torch.zeros(4, 300, device=device)
        x_NV[:, place] = height
        assert_softmax(fold(x_NV, target_N, 100), x_NV, target_N, None)
        met += 1
    assert met == 20


def test_a_tile_of_minus_infinity_adds_nothing_and_nan_is_not_lost(device: torch.device) -> None:
    """Rows of a vocabulary that is padded; and tl.max passes over NaN."""
    x_NV, target_N = logits(6, 40, device), torch.full((6,), 25, device=device)
    x_NV[:3, :20] = -torch.inf
    x_NV[3, 39] = torch.nan
    x_NV[4] = torch.nan
    _, sum_N, picked_N = state = fold(x_NV, target_N, 20)
    assert sum_N.isnan().tolist() == [False, False, False, True, True, False] and picked_N.isnan().sum() == 1
    fine_N = torch.tensor([0, 1, 2, 5], device=device)
    assert_softmax(tuple(x[fine_N] for x in state), x_NV[fine_N], target_N[fine_N], None)


def dense_gradient(x_RV: Tensor, target_R: Tensor, gradient_R: Tensor, z_loss: float, softcap: float | None) -> Tensor:
    x_RV = x_RV.double().requires_grad_()
    z_RV = capped(x_RV, softcap)
    loss_R = F.cross_entropy(z_RV, target_R, reduction="none") + z_loss * z_RV.logsumexp(1) ** 2
    return torch.autograd.grad((loss_R * gradient_R).sum(), x_RV)[0]


def backward(
    x_RV: Tensor, target_R: Tensor, gradient_R: Tensor, z_loss: float, softcap: float | None, width: int, out_RV: Tensor
) -> None:
    peak_R, sum_R, _ = fold(x_RV, target_R, width, softcap)
    scale_R = gradient_R * (1 + 2 * z_loss * (peak_R + sum_R.log())) / sum_R
    scale_R = torch.where(gradient_R == 0, 0.0, scale_R)
    for begin in range(0, x_RV.shape[1], width):
        tile = slice(begin, begin + width)
        dlogits_tile(x_RV[:, tile], begin, target_R, peak_R, scale_R, gradient_R, softcap, out_RV[:, tile])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("softcap", CAPS)
def test_gradients_are_those_of_autograd(softcap: float | None, z_loss: float, dtype: torch.dtype, device: torch.device) -> None:
    """Gradients of the loss that are not 1, of both signs; ragged tiles; rounded to the factors' dtype once."""
    x_RV = logits(9, 700, device)
    target_R = torch.tensor([0, 299, 300, 599, 600, 699, 5, 512, 511], device=device)
    gradient_R = torch.tensor([1.0, 0.3, -2.0, 7.0, 1e-3, 0.0, 1.0, 0.5, 0.25], device=device)
    out_RV = torch.empty(9, 700, dtype=dtype, device=device)
    backward(x_RV, target_R, gradient_R, z_loss, softcap, 300, out_RV)
    want_RV = dense_gradient(x_RV, target_R, gradient_R, z_loss, softcap)
    tiny = 6e-8 if dtype == torch.float16 else 0.0  # its smallest step above 0
    error_RV = (out_RV.double() - want_RV).abs()
    bound_RV = want_RV.abs() * torch.finfo(dtype).eps / 2 + gradient_R.abs()[:, None] * 2e-6 + tiny
    assert (error_RV <= bound_RV).all() and want_RV.abs().max() > 1
    assert not out_RV[5].any()


@pytest.mark.parametrize("softcap", CAPS)
def test_a_tile_is_overwritten_in_place(softcap: float | None, device: torch.device) -> None:
    """out is the logits' own buffer; what lies between the rows of a view stays."""
    buffer = torch.full((5, 64), 7.0, device=device)
    x_RV = buffer[:, :40]
    x_RV.copy_(logits(5, 40, device))
    target_R, gradient_R = torch.arange(5, device=device) * 9, torch.linspace(0.5, 1, 5, device=device)
    want_RV = dense_gradient(x_RV, target_R, gradient_R, 0.0, softcap)
    backward(x_RV, target_R, gradient_R, 0.0, softcap, 40, x_RV)
    torch.testing.assert_close(x_RV.double(), want_RV, rtol=1e-5, atol=2e-6)
    assert (buffer[:, 40:] == 7.0).all()


def test_a_row_of_weight_0_is_exactly_zero_whatever_its_logits(device: torch.device) -> None:
    x_RV = logits(8, 600, device)
    gradient_R = torch.ones(8, device=device)
    dead = torch.tensor([1, 2, 4, 7], device=device)
    x_RV[dead] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=device)[:, None]
    gradient_R[dead] = 0.0
    target_R = torch.full((8,), 3, device=device)
    for out_RV in (torch.full((8, 600), torch.nan, device=device), x_RV.clone()):
        backward(x_RV, target_R, gradient_R, 0.0, None, 600, out_RV)
        assert torch.equal(out_RV[dead], torch.zeros(4, 600, device=device)) and (out_RV != 0).any(1).sum() == 4
        assert out_RV.isfinite().all()


def test_a_scale_of_zero_alone_does_not_make_a_row_idle(device: torch.device) -> None:
    """As where 1 + 2 * z_loss * lse is 0: the target's own part stays, with the slope of its logit."""
    x_RV, gradient_R = logits(2, 40, device), torch.tensor([2.0, 0.5], device=device)
    target_R, zero_R, out_RV = torch.tensor([3, 39], device=device), torch.zeros(2, device=device), torch.empty_like(x_RV)
    dlogits_tile(x_RV, 0, target_R, zero_R, zero_R, gradient_R, 5.0, out_RV)
    want_RV = -F.one_hot(target_R, 40) * gradient_R[:, None] * (1 - torch.tanh(x_RV / 5.0) ** 2)
    torch.testing.assert_close(out_RV, want_RV, rtol=1e-5, atol=1e-7)
    assert out_RV.count_nonzero() == 2


def factors(rows: int, size: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_007 + size * 101 + columns)
    hidden_NH = torch.randn(rows, size, generator=generator)
    head_VH = torch.randn(columns, size, generator=generator) * 3 * size**-0.5
    target_N = torch.randint(0, columns, (rows,), generator=generator)
    return hidden_NH.to(device, dtype), head_VH.to(device, dtype), target_N.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("rows", "size", "columns"), [(16, 32, 128), (21, 48, 1100), (1, 16, 1), (33, 80, 259)])
def test_the_fused_forward_is_the_softmax(
    rows: int, size: int, columns: int, softcap: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Even and odd numbers of rows and columns, H that is no multiple of a block; one part of the vocabulary and several."""
    hidden_NH, head_VH, target_N = factors(rows, size, columns, dtype, device)
    state = fused_softmax(hidden_NH, head_VH, target_N, softcap, 0)
    assert all(x.dtype == torch.float32 for x in state)
    assert_softmax(state, hidden_NH.double() @ head_VH.double().T, target_N, softcap)


def test_fused_and_folded_agree_on_strided_factors_and_repeat_bitwise(device: torch.device) -> None:
    hidden_NH, head_VH, target_N = factors(20, 48, 1500, torch.float32, device)
    hidden_NH, head_VH = hidden_NH[:, 16:], head_VH[::2, 16:]
    target_N = (target_N // 2)[:, None].expand(-1, 3).contiguous()[:, 1]
    fused = fused_softmax(hidden_NH, head_VH, target_N, None, 0)
    folded = fold(hidden_NH @ head_VH.T, target_N, 200)
    turned = fused_softmax(hidden_NH.T.contiguous().T, head_VH.T.contiguous().T, target_N, None, 0)
    assert target_N.stride() == (3,) and all(torch.equal(x, y) for x, y in zip(fused, turned, strict=True))
    for ours, theirs in zip(fused, folded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_softmax(folded, hidden_NH.double() @ head_VH.double().T, target_N, None)
    again = fused_softmax(hidden_NH, head_VH, target_N, None, 0)
    assert all(torch.equal(x, y) for x, y in zip(fused, again, strict=True))


def test_shards_of_the_vocabulary_add_up(device: torch.device) -> None:
    """Each shard meets its own targets alone; peak and sum merge into those of the whole."""
    hidden_NH, head_VH, target_N = factors(20, 16, 300, torch.float32, device)
    target_N[:4] = torch.tensor([99, 100, 199, 200])
    whole = fused_softmax(hidden_NH, head_VH, target_N, None, 0)
    shards = [fused_softmax(hidden_NH, head_VH[v : v + 100], target_N, None, v) for v in (0, 100, 200)]
    peak_SN, sum_SN, picked_SN = (torch.stack(x) for x in zip(*shards, strict=True))
    assert torch.equal(~picked_SN.isnan(), torch.stack([target_N // 100 == shard for shard in range(3)]))
    torch.testing.assert_close(picked_SN.nansum(0), whole[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(peak_SN.amax(0), whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((sum_SN * (peak_SN - whole[0]).exp()).sum(0), whole[1], rtol=1e-5, atol=1e-5)


def test_factors_that_would_be_read_slowly_are_refused(device: torch.device) -> None:
    """By what is wrong with them, and what to do."""
    target_N, met = torch.zeros(8, dtype=torch.int64, device=device), 0
    fine = torch.ones(8, 32, device=device)
    wide = torch.ones(8, 36, device=device)
    for hidden_NH, head_VH, message in (
        (torch.ones(8, 40, device=device), torch.ones(9, 40, device=device), "hidden states of 40 columns in rows 40 elements"),
        (fine, wide[:, :32], "head of 32 columns in rows 36 elements apart"),
        (torch.ones(8, 48, device=device)[:, 1:33], fine, "hidden states that begin between multiples of 16 bytes"),
        (fine.double(), fine.double(), "no kernel for hidden states of torch.float64"),
        (fine, fine[:0], "the head has no row"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fused_softmax(hidden_NH, head_VH, target_N, None, 0)
        assert 'use forward="tiles"' in str(error.value) or not len(head_VH)
        met += 1
    assert met == 5
    fused_softmax(fine, wide[:, :16].repeat(1, 2), target_N, None, 0)


def test_no_row_works(device: torch.device) -> None:
    hidden_NH, head_VH, target_N = factors(0, 16, 300, torch.float32, device)
    assert [x.shape for x in fused_softmax(hidden_NH, head_VH, target_N, None, 0)] == [(0,)] * 3
    x_NV = logits(0, 300, device)
    assert all(x.shape == (0,) for x in fold(x_NV, target_N, 100))
    backward(x_NV, target_N, torch.ones(0, device=device), 0.0, None, 100, x_NV)
