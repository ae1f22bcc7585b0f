"""The fused selection against the method in plain Python, and against the road in torch."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_vocagno.objective import selection, selection_triton
from megatron_vocagno.objective import selection_kernels_triton as kernels
from megatron_vocagno.objective.rule import Rule, Selection
from tests.kernels import INTERPRETED
from tests.objective.selection_cases import KINDS, SETTINGS, Case, assert_selected, random_case, same, traits

ROADS = ["registers", "histograms"]
CASES = 25  # of each kind
assert CASES * len(KINDS) > 250


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the threshold is found: by one program, or as for more tokens than it can rank, or for several ranks."""
    if request.param == "histograms":
        monkeypatch.setattr(selection_triton, "IN_REGISTERS", 0)
    return str(request.param)


def select(case: Case, device: torch.device) -> Selection:
    return selection_triton.select_tokens(*case.tensors(device), **case.arguments())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_that_of_the_slow_method(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one program, and then by many small ones."""
    rng = random.Random(kind)
    met: Counter[str] = Counter()
    for number in range(CASES):
        monkeypatch.setattr(selection_triton, "BLOCK", 16 if number % 2 else 512)
        case = random_case(rng, kind, rows=rng.randint(1, 3), width=[1, 5, 16, 21, 32][number % 5])
        assert_selected(select(case, device), case, room=True)
        met.update({name: there for name, there in traits(case).items() if there})
        met[case.settings["scope"]] += 1
        met[case.settings["aggregate"]] += 1
    assert met[kind] == CASES and met["one position"] == CASES // 5, met
    assert all(met[choice] > 0 for name in ("scope", "aggregate") for choice in SETTINGS[name]), met


@pytest.mark.parametrize("kind", ["ties", "special", "broken teacher"])
def test_histograms_find_the_same_threshold(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_triton, "IN_REGISTERS", 0)
    monkeypatch.setattr(selection_triton, "BLOCK", 32)
    rng = random.Random(kind)
    met: Counter[str] = Counter()
    for number in range(9):
        case = random_case(rng, kind, rows=2, width=37)
        case.settings["scope"] = SETTINGS["scope"][number % 3]
        assert_selected(select(case, device), case, room=True)
        met.update({name: there for name, there in traits(case).items() if there})
    assert met[kind] == 9 and (kind != "ties" or met["cut among ties"] > 2), met


def test_every_float_is_ranked_in_its_order(device: torch.device, road: str) -> None:
    """All magnitudes, both signs, and neighbours: each must be told from the next."""
    bits_N = torch.arange(0, 0x7F800001, 8_973_391, dtype=torch.int32)
    bits_N = torch.cat([bits_N, bits_N + 1, torch.tensor([1, 2, 0x7F7FFFFF, 0x7F800000])]).to(torch.int32)
    values = torch.cat([bits_N.view(torch.float32), -bits_N.view(torch.float32)])
    values = values[~values.isnan()].unique()
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))].to(device)
    zero, valid, met = torch.zeros(1, len(values), device=device), torch.ones(1, len(values), device=device).bool(), 0
    for keep in (0.001, 0.3, 0.499, 0.5, 0.501, 0.77, 0.999):
        got = selection_triton.select(values[None], zero, valid, Rule(keep, "microbatch", "exclude"))
        want = torch.zeros(len(values), device=device)
        want[values.argsort(descending=True)[: selection.kept_count(len(values), keep)]] = 1
        assert torch.equal(got.weight_BS[0], want)
        met += 1
    assert met == 7 and len(values) > 900


@pytest.mark.parametrize(("scope", "rows", "width"), [("microbatch", 8, 2048), ("sequence", 3, 5000), ("microbatch", 17, 2048)])
def test_a_whole_micro_batch_is_selected_as_in_torch(scope: str, rows: int, width: int, device: torch.device) -> None:
    """In bfloat16, with int64 spans and columns of a larger tensor too; the last has more tokens than one program ranks."""
    torch.manual_seed(0)
    student, teacher = (torch.rand(rows, 2 * width, device=device).mul(12).bfloat16() for _ in range(2))
    first = torch.randint(0, 2 * width - 8, (rows, width), device=device)
    last = first + torch.randint(0, 5, (rows, width), device=device)
    valid = torch.rand(rows, width, device=device) < 0.9
    capacity = 2500 if scope == "sequence" else rows * width // 2
    settings = {"keep": 0.4, "scope": scope, "unmapped": "include", "require_positive": True, "capacity": capacity}
    inputs = student[:, :width], teacher, first, last, valid
    got = selection_triton.select_tokens(*inputs, aggregate="mean", **settings)
    want = selection.select_tokens(*(x.cpu() for x in inputs), aggregate="mean", **settings)
    assert torch.equal(got.weight_BS.cpu(), want.weight_BS) and same(got.guide_BS, want.guide_BS)
    rows_LC = got.rows_C.cpu().view(-1, capacity)
    heads = [row[: int(weight.sum())] for row, weight in zip(rows_LC, want.weight_BS.view(len(rows_LC), -1), strict=True)]
    assert torch.equal(torch.cat(heads), want.rows_C) and len(rows_LC.unique()) == rows_LC.numel()
    assert torch.allclose(got.stats_PK.cpu().sum(0), want.stats_PK.sum(0), rtol=1e-12)
    assert rows * width > 4 * selection_triton.BLOCK and want.weight_BS.sum() > 0.35 * rows * width


@pytest.mark.parametrize("aggregate", SETTINGS["aggregate"])
@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_a_range_that_ends_before_it_begins_is_unmapped(scope: str, aggregate: str, device: torch.device, road: str) -> None:
    """The host checks ranges on a CPU alone; an excess of infinity would be kept before all others."""
    first_BS = torch.tensor([[0, 3, 2, 4, 1, 0]], device=device)
    last_BS = torch.tensor([[2, 1, 2, 5, 0, 4]], device=device)
    student_BS, teacher_BU = torch.rand(1, 6, device=device) + 1, torch.rand(1, 5, device=device)
    settings = {"aggregate": aggregate, "keep": 0.6, "scope": scope, "unmapped": "exclude"}
    got = selection_triton.select_tokens(student_BS, teacher_BU, first_BS, last_BS, student_BS > 0, **settings)  # type: ignore[arg-type]
    assert got.guide_BS.isnan().tolist() == [[False, True, True, False, True, False]]
    assert got.weight_BS.sum() == 2 and not got.weight_BS[got.guide_BS.isnan()].any()


def test_a_given_guide_is_as_good_as_what_it_is_made_from(device: torch.device) -> None:
    rng, met = random.Random(4), 0
    for kind in ("ties", "special", "broken teacher"):
        case = random_case(rng, kind, rows=3, width=20)
        whole, arguments = select(case, device), case.arguments()
        del arguments["aggregate"]
        student, valid = case.tensors(device)[0], case.tensors(device)[4]
        got = selection_triton.select(student, whole.guide_BS, valid, Rule(**arguments))
        for left, right in zip(vars(got).values(), vars(whole).values(), strict=True):
            assert torch.equal(bits(left), bits(right))
            met += left.numel() > 0
    assert met > 8


def test_nothing_but_these_launches_is_asked_of_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is laid out, and the kernels run: no other operation, no copy, and thus nothing to wait for."""
    seen: list[str] = []
    jitted = type(kernels.keys)
    launch = jitted.run

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    def run(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(self.fn.__name__)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(jitted, "run", run)
    case = random_case(random.Random(0), "ties", rows=3, width=20)
    inputs, free = case.tensors(device), {"aten::empty", "aten::empty_like", "aten::view", "aten::detach", "aten::_reshape_alias"}
    for scope, launches in (("microbatch", ["keys", "threshold", "weights"]), ("sequence", ["select_row"])):
        for capacity in (None, 7):
            seen.clear()
            with Watch():
                selection_triton.select_tokens(*inputs, **(case.arguments() | {"scope": scope, "capacity": capacity}))
            assert [name for name in seen if name not in free] == launches and len(seen) > len(launches)


def test_equal_inputs_give_bitwise_equal_selections(device: torch.device, road: str) -> None:
    rng, met = random.Random(6), 0
    for kind, times in (("ties", 2), ("smooth", 2)) if INTERPRETED else [(kind, 50) for kind in KINDS]:
        case = random_case(rng, kind, rows=3, width=400)
        first = select(case, device)
        for _ in range(times - 1):
            for left, right in zip(vars(first).values(), vars(select(case, device)).values(), strict=True):
                assert torch.equal(bits(left), bits(right))
                met += left.numel() > 0
    assert met > 5


@pytest.mark.parametrize(("rows", "width", "teacher"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_nothing_to_select_from_is_an_empty_selection(
    rows: int, width: int, teacher: int, scope: str, device: torch.device, road: str
) -> None:
    nowhere = torch.zeros(rows, width, dtype=torch.int32, device=device)
    valid = torch.ones(rows, width, device=device).bool()
    student, losses = torch.ones(rows, width, device=device), torch.ones(rows, teacher, device=device)
    settings = {"aggregate": "max", "keep": 0.4, "scope": scope, "unmapped": "exclude"}
    got = selection_triton.select_tokens(student, losses, nowhere, nowhere, valid, **settings)  # type: ignore[arg-type]
    assert got.weight_BS.shape == got.guide_BS.shape == (rows, width) and not got.weight_BS.any()
    assert sorted(got.rows_C.tolist()) == list(range(rows * width))
    assert got.stats_PK.sum().item() == 3 * rows * width  # valid, unmapped, and their losses


# ---------------------------------------------------------------- over ranks

RANKS = 2


def make_shared_cases() -> list[tuple[Case, dict]]:
    """Cases of 4 rows, 2 a rank: ties across ranks, a rank that has nothing."""
    rng, cases = random.Random(7), []
    for number in range(8):
        case = random_case(rng, ["ties", "equal", "smooth", "special"][number % 4], rows=2 * RANKS, width=9)
        settings = case.arguments() | {"scope": "global", "capacity": None}
        if number == 5:
            case.valid[:2] = [[False] * 9] * 2
        cases.append((case, settings))
    return cases


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = []
    for case, settings in make_shared_cases():
        part = [x.chunk(RANKS)[rank] for x in case.tensors()]
        results.append(selection_triton.select_tokens(*part, **settings, group=dist.group.WORLD))
    torch.save([vars(result) for result in results], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not INTERPRETED, reason="two ranks on one GPU: gloo would carry the counts over the host")
def test_two_ranks_choose_as_one(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(tmp_path,), nprocs=RANKS)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    met: Counter[str] = Counter()
    for (case, settings), *parts in zip(make_shared_cases(), *ranks, strict=True):
        whole = selection.select_tokens(*case.tensors(), **settings)
        assert torch.equal(torch.cat([part["weight_BS"] for part in parts]), whole.weight_BS)
        added, want = sum(part["stats_PK"].sum(0) for part in parts), whole.stats_PK.sum(0)
        want[-2:] *= RANKS  # every rank reports the one threshold: the mean is unchanged
        assert torch.allclose(added, want, rtol=1e-12, equal_nan=True)
        for part, weight_BS in zip(parts, whole.weight_BS.chunk(RANKS), strict=True):
            count = int(weight_BS.sum())
            assert torch.equal(part["rows_C"][:count], weight_BS.flatten().nonzero().squeeze(1))
            met["weights on a rank"] += count > 0
        met.update({name: there for name, there in traits(case).items() if there})
    assert met["weights on a rank"] > 8 and met["equal"] == met["ties"] == 2, met
