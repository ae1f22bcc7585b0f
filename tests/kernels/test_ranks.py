"""Selection over ranks: two processes select what one process selects from their concatenated batches."""

from __future__ import annotations

import random
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_vocagno.objective import guidance
from megatron_vocagno.objective.guidance import guided_loss
from megatron_vocagno.objective.statistics import STATS
from tests.kernels import INTERPRETED, Backend

RANKS = 2


def make_cases(count: int) -> list[dict]:
    """Quantized losses: ties within and across ranks. Shares of eligible tokens that differ from rank to rank."""
    rng, generator = random.Random(2), torch.Generator().manual_seed(1)
    cases = []
    for _ in range(count):
        levels, rows, width = rng.choice([1, 2, 16, 10_000]), rng.randint(1, 3), rng.choice([1, 5, 32])
        shape = (RANKS * rows, width)
        student, teacher = (torch.randint(0, levels + 1, shape, generator=generator) / 8 for _ in range(2))
        unmapped = torch.rand(shape, generator=generator) < rng.choice([0.0, 0.3])
        first = torch.arange(width).repeat(RANKS * rows, 1)
        valid = torch.rand(shape, generator=generator) < rng.choice([0.5, 1.0])
        if rng.random() < 0.5:  # the first rank has fewer, or none
            valid[:rows] &= torch.rand(rows, width, generator=generator) < rng.choice([0.0, 0.2])
        settings = {
            "keep": rng.choice([0.1, 0.4, 1.0]),
            "unmapped": rng.choice(["include", "exclude"]),
            "weighting": rng.choice(["top_k", "top_k", "threshold", "control_variate"]),
        }
        settings["require_positive"] = settings["weighting"] == "top_k" and rng.choice([False, True])
        cases.append({"inputs": (student, teacher, first, first + ~unmapped, valid), "settings": settings})
    return cases


def rank_main(rank: int, folder: Path, backend: Backend, count: int) -> None:
    torch.set_num_threads(1)
    guidance.select_tokens = backend.select_tokens
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = []
    for case in make_cases(count):
        student, *others = (x.chunk(RANKS)[rank] for x in case["inputs"])
        leaf = student.clone().requires_grad_()
        got = guided_loss(leaf, *others, scope="global", group=dist.group.WORLD, **case["settings"])
        got.loss.backward()
        results.append((got.loss.detach(), got.weight_BS, got.stats, leaf.grad, got.tokens_C))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_choose_as_one(backend: Backend, tmp_path: Path) -> None:
    if backend.device.type == "cuda":
        pytest.skip("two ranks on one GPU: gloo would transfer the counts over the host")
    count = 12 if INTERPRETED else 60
    set_forkserver_preload([__name__])  # one import for all ranks
    mp.start_processes(rank_main, (tmp_path, backend, count), RANKS, start_method="forkserver")  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    met = dict.fromkeys(["ties across ranks", "uneven", "one rank has none", "nothing kept"], 0)
    for case, *parts in zip(make_cases(count), *ranks, strict=True):
        (student, teacher, first, last, valid), settings = case["inputs"], case["settings"]
        leaf = student.clone().requires_grad_()
        whole = guided_loss(leaf, teacher, first, last, valid, scope="microbatch", **settings)
        whole.loss.backward()
        losses, weights, stats, gradients, tokens = zip(*parts, strict=True)
        # an exponential may be rounded differently at another place of a vector
        assert torch.allclose(torch.cat(weights), whole.weight_BS, rtol=0, atol=2e-7)
        assert torch.equal(torch.cat(weights) == 0, whole.weight_BS == 0)
        assert torch.allclose(sum(losses), whole.loss) and torch.allclose(torch.cat(gradients), leaf.grad)
        for tokens_C, weight_BS in zip(tokens, weights, strict=True):
            assert torch.equal(tokens_C[: int((weight_BS != 0).sum())], weight_BS.flatten().nonzero().squeeze(1))

        added, want = sum(stats), whole.stats
        want[STATS.index("threshold_sum")] *= RANKS  # every rank reports the one threshold: the mean is unchanged
        want[STATS.index("thresholds")] *= RANKS
        assert torch.allclose(added, want)

        excess, eligible = student - whole.guide_BS, valid & ~whole.guide_BS.isnan()
        kept = whole.weight_BS.bool() & eligible
        threshold = excess[kept].min() if kept.any() else torch.tensor(torch.nan)
        counts = [part.sum().item() for part in eligible.chunk(RANKS)]
        met["ties across ranks"] += all((part == threshold).any() for part in excess.where(eligible, torch.nan).chunk(RANKS))
        met["uneven"] += counts[0] != counts[1]
        met["one rank has none"] += 0 in counts and any(counts)
        met["nothing kept"] += not kept.any()
    assert min(met.values()) > (0 if INTERPRETED else 3), met
