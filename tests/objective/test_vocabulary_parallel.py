"""The head's rows over two ranks: losses and gradients of the whole head, and what each rank keeps of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_vocagno.objective import linear_ce
from megatron_vocagno.objective.linear_ce import LearnedRows, token_loss
from tests.objective.test_linear_ce import make
from tests.objective.test_linear_ce_options import dense

RANKS = 2
VOCABULARY = 301
CASES = list(itertools.product([1, 128, 150, 300], [None, 5.0], [0.0, 1e-2], [torch.float32, torch.bfloat16]))
"""Where the head is cut, softcap, z-loss, dtype."""


def case(dtype: torch.dtype):
    hidden, head, target, weight = make(40, 16, VOCABULARY, dtype)
    target[:4] = torch.tensor([0, VOCABULARY - 1, 128, -100])
    weight[:4] = 0.5
    return hidden, head, target, weight


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    linear_ce.CPU_TILE_BYTES = 1  # several tiles a shard
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = []
    for cut, softcap, z_loss, dtype in CASES:
        hidden, head, target, weight = case(dtype)
        begin, end = [(0, cut), (cut, VOCABULARY)][rank]
        hidden, shard, rows = hidden.requires_grad_(), head[begin:end].clone().requires_grad_(), LearnedRows()
        loss = token_loss(
            hidden, shard, target, softcap=softcap, z_loss=z_loss, rows=rows, group=dist.group.WORLD, first_id=begin
        )
        rows.tell(weight.nonzero().squeeze(1))
        (loss * weight).sum().backward()
        results.append((loss.detach(), hidden.grad, shard.grad))
    hidden, head, target, _ = case(torch.float32)
    nowhere = token_loss(hidden, head[:100], target, group=dist.group.WORLD, first_id=100 * rank)
    head[128] = -torch.inf  # of one rank: an infinite loss stays infinite
    shard = head[:150] if rank == 0 else head[150:]
    infinite = token_loss(hidden.abs().detach(), shard, target, group=dist.group.WORLD, first_id=150 * rank)
    torch.save((results, nowhere, infinite), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_shards_learn_as_one_head(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(tmp_path,), nprocs=RANKS)  # type: ignore[no-untyped-call]
    (first, nowhere, infinite), (second, _, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    met = 0
    for (_, softcap, z_loss, dtype), a, b in zip(CASES, first, second, strict=True):
        hidden, head, target, weight = case(dtype)
        hidden, head = hidden.float().requires_grad_(), head.float().requires_grad_()
        loss = dense(hidden, head, target, softcap, z_loss)
        (loss * weight).sum().backward()
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), "the ranks must agree bit by bit"
        torch.testing.assert_close(a[0], loss.detach(), rtol=1e-5, atol=1e-5)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(a[1].float(), hidden.grad, **close)
        torch.testing.assert_close(torch.cat([a[2], b[2]]).float(), head.grad, **close)
        met += 1
    assert met == 32
    target = case(torch.float32)[2]
    assert torch.equal(nowhere.isnan(), target >= 200), "a target that no shard holds has no loss"
    assert nowhere.isnan().any()
    assert torch.equal(infinite.isinf(), target == 128) and infinite.isinf().any()
