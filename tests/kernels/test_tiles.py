"""The work on a tile of logits, against dense logits in float64 and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import HALVES, Backend
from tests.kernels.reference import capped

CAPS = [None, 5.0]


def logits(tokens: int, columns: int, backend: Backend) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * tokens + columns)
    return (torch.randn(tokens, columns, generator=generator) * 4).to(backend.device)


def start(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """max, sum and target logit before the first tile."""
    return tuple(torch.full((tokens,), value, device=device) for value in (-torch.inf, 0.0, torch.nan))


def softmax(
    backend: Backend, x_NV: Tensor, target_N: Tensor, width: int, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All tiles, each a view whose tokens are V elements apart."""
    state, x_NV = start(len(x_NV), x_NV.device), x_NV.clone()
    for begin in range(0, x_NV.shape[1], width):
        backend.tiles.update_online_softmax(x_NV[:, begin : begin + width], begin, target_N, *state, softcap)
    return state


def assert_softmax(state: tuple[Tensor, Tensor, Tensor], x_NV: Tensor, target_N: Tensor, softcap: float | None) -> None:
    """max + log(sum) and the target logit are those of float64, up to rounding at the scale of the logits."""
    max_N, sum_N, target_logit_N = (x.double() for x in state)
    z_NV = capped(x_NV.double(), softcap)
    torch.testing.assert_close(max_N, z_NV.amax(1), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(max_N + sum_N.log(), z_NV.logsumexp(1), rtol=1e-6, atol=3e-6)
    met_N = (target_N >= 0) & (target_N < x_NV.shape[1])
    want_N = z_NV.gather(1, target_N.clamp(0, x_NV.shape[1] - 1)[:, None]).squeeze(1)
    torch.testing.assert_close(target_logit_N, torch.where(met_N, want_N, torch.nan), rtol=1e-6, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (512, 512), (513, 513), (1100, 600), (96, 32)])
def test_tiles_add_up_to_the_softmax_of_the_token(columns: int, width: int, softcap: float | None, backend: Backend) -> None:
    """Even and ragged tiles, narrower and wider than what a program holds at a time."""
    x_NV = logits(7, columns, backend)
    target_N = torch.arange(7, device=backend.device) * (columns // 7) + columns % 7
    target_N[5:] = torch.tensor([-100, columns])  # no tile contains these
    assert_softmax(softmax(backend, x_NV, target_N, width, softcap), x_NV, target_N, softcap)


def test_every_target_is_found_in_its_own_tile_and_in_no_other(backend: Backend) -> None:
    """A column that only pads a tile has the number of a column of the next one."""
    columns, width = 130, 50
    target_N = torch.arange(-2, columns + 70, device=backend.device)
    x_NV = logits(1, columns, backend).expand(len(target_N), columns)
    target_logit_N = torch.full((len(target_N),), torch.nan, device=backend.device)
    met = 0
    for begin in range(0, columns, width):
        before_N = target_logit_N.clone()
        max_N, sum_N, _ = start(len(target_N), backend.device)
        end = min(begin + width, columns)
        tile = x_NV[:, begin:end].clone()
        backend.tiles.update_online_softmax(tile, begin, target_N, max_N, sum_N, target_logit_N, None)
        mine_N = (target_N >= begin) & (target_N < end)
        assert torch.equal(target_logit_N[mine_N], x_NV[0, begin:end])
        assert torch.equal(target_logit_N[~mine_N].nan_to_num(), before_N[~mine_N].nan_to_num())
        met += int(mine_N.sum())
    assert met == columns


def test_extreme_logits_neither_overflow_nor_are_lost(backend: Backend) -> None:
    """In every place of a tile: 20 at a time, one per token."""
    places, heights = [0, 99, 100, 299], [1e4, -1e4, 88.0, 3e38, -torch.inf]
    x_NV = torch.zeros(20, 300, device=backend.device)
    for n, (place, height) in enumerate(itertools.product(places, heights)):
        x_NV[n, place] = height
    for target in places:
        target_N = torch.full((20,), target, device=backend.device)
        assert_softmax(softmax(backend, x_NV, target_N, 100), x_NV, target_N, None)


def test_a_tile_of_minus_infinity_adds_nothing_and_nan_is_not_lost(backend: Backend) -> None:
    """A vocabulary may be padded with -inf. Triton's maximum ignores NaN."""
    x_NV, target_N = logits(6, 40, backend), torch.full((6,), 25, device=backend.device)
    x_NV[:3, :20] = -torch.inf
    x_NV[3, 39] = torch.nan
    x_NV[4] = torch.nan
    _, sum_N, target_logit_N = state = softmax(backend, x_NV, target_N, 20)
    assert sum_N.isnan().tolist() == [False, False, False, True, True, False] and target_logit_N.isnan().sum() == 1
    fine_N = torch.tensor([0, 1, 2, 5], device=backend.device)
    assert_softmax(tuple(x[fine_N] for x in state), x_NV[fine_N], target_N[fine_N], None)


def dense_gradient(x_RV: Tensor, target_R: Tensor, gradient_R: Tensor, softcap: float | None) -> Tensor:
    x_RV = x_RV.double().requires_grad_()
    loss_R = F.cross_entropy(capped(x_RV, softcap), target_R, reduction="none")
    return torch.autograd.grad((loss_R * gradient_R).sum(), x_RV)[0]


def backward(
    backend: Backend, x_RV: Tensor, target_R: Tensor, gradient_R: Tensor, softcap: float | None, width: int, out_RV: Tensor
) -> None:
    max_R, sum_R, _ = softmax(backend, x_RV, target_R, width, softcap)
    for begin in range(0, x_RV.shape[1], width):
        tile, out = (x[:, begin : begin + width] for x in (x_RV, out_RV))
        out = tile if out_RV is x_RV else out
        backend.tiles.dlogits_tile(tile, begin, target_R, max_R, gradient_R / sum_R, gradient_R, softcap, out)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("softcap", CAPS)
def test_gradients_are_those_of_autograd(softcap: float | None, dtype: torch.dtype, backend: Backend) -> None:
    """Gradients of the loss that are not 1, of both signs. Ragged tiles. Rounded to the factors' dtype once."""
    x_RV, device = logits(9, 700, backend), backend.device
    target_R = torch.tensor([0, 299, 300, 599, 600, 699, 5, 512, 511], device=device)
    gradient_R = torch.tensor([1.0, 0.3, -2.0, 7.0, 1e-3, 0.0, 1.0, 0.5, 0.25], device=device)
    want_RV = dense_gradient(x_RV, target_R, gradient_R, softcap)
    out_RV = torch.empty(9, 700, dtype=dtype, device=device)
    backward(backend, x_RV, target_R, gradient_R, softcap, 300, out_RV)
    tiny = 6e-8 if dtype == torch.float16 else 0.0  # its smallest step above 0
    error_RV = (out_RV.double() - want_RV).abs()
    bound_RV = want_RV.abs() * torch.finfo(dtype).eps / 2 + gradient_R.abs()[:, None] * 2e-6 + tiny
    assert (error_RV <= bound_RV).all() and want_RV.abs().max() > 1
    assert not out_RV[5].any()


@pytest.mark.parametrize("softcap", CAPS)
def test_a_tile_is_overwritten_in_place(softcap: float | None, backend: Backend) -> None:
    """`out` is the logits' own buffer. Elements between the tokens of a view are left unchanged."""
    buffer = torch.full((5, 64), 7.0, device=backend.device)
    x_RV = buffer[:, :40]
    x_RV.copy_(logits(5, 40, backend))
    target_R, gradient_R = (x.to(backend.device) for x in (torch.arange(5) * 9, torch.linspace(0.5, 1, 5)))
    want_RV = dense_gradient(x_RV, target_R, gradient_R, softcap)
    backward(backend, x_RV, target_R, gradient_R, softcap, 40, x_RV)
    torch.testing.assert_close(x_RV.double(), want_RV, rtol=1e-5, atol=2e-6)
    assert (buffer[:, 40:] == 7.0).all()


def test_no_token_works(backend: Backend) -> None:
    x_NV, target_N = logits(0, 300, backend), torch.zeros(0, dtype=torch.int64, device=backend.device)
    assert all(x.shape == (0,) for x in softmax(backend, x_NV, target_N, 100))
    backward(backend, x_NV, target_N, torch.ones(0, device=backend.device), None, 100, x_NV)
