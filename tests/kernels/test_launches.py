"""Properties of the Triton backend alone: its launches, and inputs that the torch backend refuses or reads."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_vocagno.objective import selection, selection_kernels_triton, selection_triton
from megatron_vocagno.objective.linear_ce_triton import dlogits_tile
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.statistics import STATS
from tests.kernels import INTERPRETED, Backend
from tests.objective.selection_cases import SETTINGS, random_case, same

SHAPES = [("microbatch", 3, 1024), ("sequence", 2, 2048), *([] if INTERPRETED else [("microbatch", 17, 2048)])]


@pytest.mark.parametrize(("scope", "rows", "width"), SHAPES)
def test_a_whole_micro_batch_is_selected_as_in_torch(
    scope: str, rows: int, width: int, each_ranking: Backend, device: torch.device
) -> None:
    """In bfloat16, with int64 spans and columns of a larger tensor. The last shape has more tokens than one program ranks."""
    torch.manual_seed(0)
    student, teacher = (torch.rand(rows, 2 * width, device=device).mul(12).bfloat16() for _ in range(2))
    first = torch.randint(0, 2 * width - 8, (rows, width), device=device)
    last = first + torch.randint(0, 5, (rows, width), device=device)
    valid = torch.rand(rows, width, device=device) < 0.9
    capacity = width // 2 if scope == "sequence" else rows * width // 2
    rule = Rule(0.4, "mean", scope, "include", require_positive=True)  # type: ignore[arg-type]
    inputs = student[:, :width], teacher, first, last, valid
    got = each_ranking.select_tokens(*inputs, rule, capacity=capacity)
    want = selection.select_tokens(*(x.cpu() for x in inputs), rule, capacity=capacity)  # type: ignore[arg-type]
    assert torch.equal(got.weight_BS.cpu(), want.weight_BS) and same(got.guide_BS, want.guide_BS)
    tokens_LC = got.tokens_C.cpu().view(-1, capacity)
    heads = [row[: int(weight.sum())] for row, weight in zip(tokens_LC, want.weight_BS.view(len(tokens_LC), -1), strict=True)]
    assert torch.equal(torch.cat(heads), want.tokens_C) and len(tokens_LC.unique()) == tokens_LC.numel()
    assert torch.allclose(got.stats.cpu(), want.stats, rtol=1e-12)
    assert rows * width > 4 * selection_triton.BLOCK and want.weight_BS.sum() > 0.35 * rows * width


@pytest.mark.parametrize("scope", ["microbatch", "sequence"])
@pytest.mark.parametrize("weighting", ["top_k", "threshold", "control_variate"])
def test_chunks_across_blocks_have_the_weights_of_torch(
    weighting: str, scope: str, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk over a whole row, chunks longer than a block, and rows of chunks of one token."""
    if backend.triton:
        monkeypatch.setattr("megatron_vocagno.objective.selection_triton.BLOCK", 32)
    torch.manual_seed(0)
    width = 150
    first = torch.stack([torch.zeros(width).long(), torch.arange(width) // 40, torch.arange(width), torch.arange(width) // 3])
    student, teacher = torch.rand(4, width) * 4, torch.rand(4, width + 1) * 4
    teacher[0, 0], teacher[1, :4] = 300.0, torch.tensor([80.0, 81.0, 79.0, 75.0])
    rule = Rule(scope=scope, unit="chunk", weighting=weighting)  # type: ignore[arg-type]
    inputs = student, teacher, first, first + 1, torch.ones(4, width).bool()
    got = backend.select_tokens(*(x.to(device) for x in inputs), rule)
    want = selection.select_tokens(*inputs, rule)
    assert torch.allclose(got.weight_BS.cpu(), want.weight_BS, rtol=0, atol=1e-6) and same(got.guide_BS, want.guide_BS)
    assert torch.equal(got.weight_BS.cpu() == 0, want.weight_BS == 0) and torch.allclose(got.stats.cpu(), want.stats, rtol=1e-6)
    assert 50 < want.weight_BS.sum() < 550 and want.stats[STATS.index("units")] == 1 + 4 + 150 + 50


@pytest.mark.parametrize("aggregate", SETTINGS["aggregate"])
def test_a_range_that_ends_before_it_begins_is_unmapped(aggregate: str, each_ranking: Backend, device: torch.device) -> None:
    """The host checks ranges on a CPU only. An excess of infinity would be kept before all others."""
    first_BS = torch.tensor([[0, 3, 2, 4, 1, 0]], device=device)
    last_BS = torch.tensor([[2, 1, 2, 5, 0, 4]], device=device)
    student_BS, teacher_BU = torch.rand(1, 6, device=device) + 1, torch.rand(1, 5, device=device)
    for scope in ("sequence", "microbatch"):
        rule = Rule(0.6, aggregate, scope, "exclude")  # type: ignore[arg-type]
        got = each_ranking.select_tokens(student_BS, teacher_BU, first_BS, last_BS, student_BS > 0, rule)
        assert got.guide_BS.isnan().tolist() == [[False, True, True, False, True, False]]
        assert got.weight_BS.sum() == 2 and not got.weight_BS[got.guide_BS.isnan()].any()


def test_the_device_is_asked_for_nothing_but_these_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is allocated and the kernels run. No other operation, no copy, and thus nothing to wait for."""
    seen: list[str] = []
    jitted = type(selection_kernels_triton.keys)
    kernel_of = jitted.__getitem__

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    def watched(self, grid):  # type: ignore[no-untyped-def]
        def launch(*args, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(self.fn.__name__)
            with _disable_current_modes():
                return kernel_of(self, grid)(*args, **kwargs)

        return launch

    monkeypatch.setattr(jitted, "__getitem__", watched)
    case = random_case(random.Random(0), "ties", rows=3, width=20)
    inputs, free = case.tensors(device), {"aten::empty", "aten::empty_like", "aten::view", "aten::detach", "aten::_reshape_alias"}
    for scope, weighting, launches in (
        ("microbatch", "top_k", ["keys", "threshold", "weights"]),
        ("microbatch", "threshold", ["keys", "count_above", "weights"]),
        ("global", "control_variate", ["keys", "count_above", "weights"]),
        ("sequence", "top_k", ["select_row"]),
        ("sequence", "control_variate", ["select_row"]),
    ):
        rule = case.rule(scope=scope, unit="chunk", weighting=weighting, require_positive=False)
        for capacity in (None, 7):
            seen.clear()
            with Watch():
                selection_triton.select_tokens(*inputs, rule, capacity=capacity)  # type: ignore[arg-type]
            assert [name for name in seen if name not in free] == launches and len(seen) > len(launches)


def test_a_token_without_a_gradient_is_exactly_zero_for_any_logits(device: torch.device) -> None:
    x_RV = torch.randn(8, 600, generator=torch.Generator().manual_seed(0)).mul(4).to(device)
    gradient_R, target_R = torch.ones(8, device=device), torch.full((8,), 3, device=device)
    max_R, sum_R = x_RV.amax(1), (x_RV - x_RV.amax(1, keepdim=True)).exp().sum(1)
    dead = torch.tensor([1, 2, 4, 7], device=device)
    x_RV[dead] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=device)[:, None]
    max_R[dead], gradient_R[dead] = torch.nan, 0.0
    for out_RV in (torch.full((8, 600), torch.nan, device=device), x_RV.clone()):
        dlogits_tile(x_RV, 0, target_R, max_R, gradient_R / sum_R, gradient_R, None, out_RV)
        assert torch.equal(out_RV[dead], torch.zeros(4, 600, device=device)) and (out_RV != 0).any(1).sum() == 4
        assert out_RV.isfinite().all()
    assert INTERPRETED or device.type == "cuda"
