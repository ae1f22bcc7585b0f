"""A step of several micro-batches chooses its tokens as if it were one."""

from __future__ import annotations

import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.config import Guidance
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.loss import Chosen, Labels, Objective, from_tensors, to_tensors
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Unmapped
from megatron_vocagno.objective.statistics import STATS
from tests.objective import plain

CPU = torch.device("cpu")


def step_of(dataset: AlignedDataset, seed: int) -> tuple[list[torch.Tensor], list[Labels]]:
    """Losses [B, S] and labels of three micro-batches of two rows, with a NaN of each model."""
    losses, labels = [], []
    torch.manual_seed(seed)
    for batch in Batches(TrainRows(dataset, 64, seed=seed), Layout(2, 3, 1), 0).step(0):
        teacher_BU = torch.rand(2, max(map(len, batch.teacher_targets))) * 9
        teacher_BU[0, 7] = torch.nan
        # coarse, so that there are ties
        losses.append((torch.rand(batch.target_BS.shape) * 9).round(decimals=1))
        losses[-1][1, 9] = torch.nan
        labels.append(
            Labels(
                batch.target_BS,
                teacher_BU,
                batch.first_BS,
                batch.last_BS,
                torch.tensor([50.0]),
                torch.empty(128, 0),
                batch.text_BS,
            )
        )
    return losses, labels


@pytest.mark.parametrize("unmapped", ["include", "exclude"])
def test_the_tokens_of_a_step_are_chosen_as_if_it_were_one_batch(dataset: AlignedDataset, unmapped: Unmapped) -> None:
    met = 0
    for seed in range(3):
        losses, labels = step_of(dataset, seed)
        objective = Objective(Guidance(scope="global", unmapped=unmapped), CPU)
        chosen = objective.choose(losses, labels)
        rows = [
            [row for of_batch in labels for row in getattr(of_batch, name).tolist()]
            for name in ("teacher_loss_BU", "first_BS", "last_BS", "target_BS")
        ]
        expected = plain.select_tokens(
            torch.cat(losses).tolist(),
            *rows[:3],
            [[target != IGNORE for target in row] for row in rows[3]],
            aggregate="max",
            keep="0.4",
            scope="microbatch",
            unmapped=unmapped,
            require_positive=False,
            capacity=None,
        )
        assert torch.cat([of_batch.weight_BS for of_batch in chosen]).tolist() == expected.weight
        for of_batch in chosen:
            assert of_batch.tokens_C.tolist() == of_batch.weight_BS.flatten().nonzero().squeeze(1).tolist()
            met += len(of_batch.tokens_C)
        seen = dict(zip(STATS, objective._seen.tolist(), strict=True))
        assert seen["nonfinite"] == 3 and seen["weight_sum"] == sum(map(sum, expected.weight))
        # a micro-batch alone would have chosen others
        alone = Objective(Guidance(unmapped=unmapped), CPU).choose(losses[:1], labels[:1])[0]
        assert not torch.equal(alone.weight_BS, chosen[0].weight_BS)
    assert met > 300


def test_a_loss_with_chosen_tokens_is_that_of_a_loss_that_chooses(dataset: AlignedDataset) -> None:
    losses, labels = step_of(dataset, 4)
    for loss_BS, of_batch in zip(losses, labels, strict=True):
        choosing, told = Objective(Guidance(), CPU), SelectedTokens()
        one = choosing(loss_BS.requires_grad_(), of_batch, told)
        [chosen] = Objective(Guidance(), CPU).choose([loss_BS.detach()], [of_batch])
        knowing, told_again = Objective(Guidance(), CPU), SelectedTokens()
        other = knowing(loss_BS, chosen, told_again)
        assert torch.equal(one, other) and one > 0
        assert torch.equal(told.tokens_R, told_again.tokens_R)  # type: ignore[arg-type]
        assert torch.equal(*torch.autograd.grad(one, loss_BS), *torch.autograd.grad(other, loss_BS))
        # what was chosen before was counted before
        assert choosing._seen.any() and not knowing._seen.any()


def test_looking_selects_nothing_and_keeps_the_losses(dataset: AlignedDataset) -> None:
    losses, labels = step_of(dataset, 5)
    objective = Objective(Guidance(scope="global"), CPU)
    with objective.looking() as looked:
        for loss_BS, of_batch in zip(losses, labels, strict=True):
            objective(loss_BS, of_batch, SelectedTokens())
    assert all(a is b for a, b in zip(looked, losses, strict=True))
    assert not objective._seen.any()
    objective(losses[0], labels[0], SelectedTokens())
    assert objective._seen.any() and len(looked) == 3


@pytest.mark.parametrize(
    ("guidance", "micro_batches", "looks"),
    [
        (Guidance(scope="global"), 2, True),
        (Guidance(scope="global"), 1, False),
        (Guidance(scope="microbatch"), 2, False),
        (Guidance(scope="global", objective="clm"), 2, False),
    ],
)
def test_a_step_is_looked_at_first_where_one_selection_goes_over_several_micro_batches(
    guidance: Guidance, micro_batches: int, looks: bool
) -> None:
    assert Objective(guidance, CPU).looks_first(micro_batches) == looks


def test_a_pipeline_tells_the_two_kinds_of_labels_apart(dataset: AlignedDataset) -> None:
    _, labels = step_of(dataset, 6)
    chosen = Chosen(labels[0].target_BS, torch.ones(2, 64), torch.arange(128), torch.ones(1))
    for sent in (labels[0], chosen):
        received = from_tensors(to_tensors(sent))
        assert type(received) is type(sent) and all(a is b for a, b in zip(received, sent, strict=True))
