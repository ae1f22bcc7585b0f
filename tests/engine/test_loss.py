"""A step of several micro-batches selects its tokens as one micro-batch would."""

from __future__ import annotations

import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.config import Guidance
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.loss import GuidedObjective, LossInputs, PreselectedInputs, from_tensors, to_tensors
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Unmapped
from megatron_vocagno.objective.statistics import STATS
from tests.objective import plain

CPU = torch.device("cpu")


def step_of(dataset: AlignedDataset, seed: int) -> tuple[list[torch.Tensor], list[LossInputs]]:
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
            LossInputs(
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
def test_the_selection_over_a_step_equals_that_over_one_batch(dataset: AlignedDataset, unmapped: Unmapped) -> None:
    met = others = 0
    for seed in range(3):
        losses, labels = step_of(dataset, seed)
        objective = GuidedObjective(Guidance(scope="global", unmapped=unmapped), CPU)
        chosen = objective.preselect(losses, labels)
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
        seen = dict(zip(STATS, objective._stats.tolist(), strict=True))
        assert seen["nonfinite"] == 3 and seen["weight_sum"] == sum(map(sum, expected.weight))
        # a selection within one micro-batch keeps other tokens
        alone = GuidedObjective(Guidance(unmapped=unmapped), CPU).preselect(losses[:1], labels[:1])[0]
        others += not torch.equal(alone.weight_BS, chosen[0].weight_BS)
    assert met > 300 and others > 0


def test_a_loss_with_preselected_tokens_equals_one_that_selects(dataset: AlignedDataset) -> None:
    losses, labels = step_of(dataset, 4)
    for loss_BS, of_batch in zip(losses, labels, strict=True):
        selecting, selected = GuidedObjective(Guidance(), CPU), SelectedTokens()
        one = selecting(loss_BS.requires_grad_(), of_batch, selected)
        [chosen] = GuidedObjective(Guidance(), CPU).preselect([loss_BS.detach()], [of_batch])
        preselected, selected_again = GuidedObjective(Guidance(), CPU), SelectedTokens()
        other = preselected(loss_BS, chosen, selected_again)
        assert torch.equal(one, other) and one > 0
        assert torch.equal(selected.tokens_R, selected_again.tokens_R)  # type: ignore[arg-type]
        assert torch.equal(*torch.autograd.grad(one, loss_BS), *torch.autograd.grad(other, loss_BS))
        # the statistics of preselected tokens were added by preselect
        assert selecting._stats.any() and not preselected._stats.any()


def test_recording_losses_selects_nothing(dataset: AlignedDataset) -> None:
    losses, labels = step_of(dataset, 5)
    objective = GuidedObjective(Guidance(scope="global"), CPU)
    with objective.recording_losses() as recorded:
        for loss_BS, of_batch in zip(losses, labels, strict=True):
            objective(loss_BS, of_batch, SelectedTokens())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(recorded, losses, strict=True))
    assert not objective._stats.any()
    objective(losses[0], labels[0], SelectedTokens())
    assert objective._stats.any() and len(recorded) == 3


@pytest.mark.parametrize(
    ("guidance", "micro_batches", "expected"),
    [
        (Guidance(scope="global"), 2, True),
        (Guidance(scope="global"), 1, False),
        (Guidance(scope="microbatch"), 2, False),
        (Guidance(scope="global", objective="clm"), 2, False),
    ],
)
def test_one_selection_over_several_micro_batches_needs_two_passes(
    guidance: Guidance, micro_batches: int, expected: bool
) -> None:
    assert GuidedObjective(guidance, CPU).needs_two_passes(micro_batches) == expected


def test_a_pipeline_distinguishes_the_two_types_of_loss_inputs(dataset: AlignedDataset) -> None:
    _, labels = step_of(dataset, 6)
    chosen = PreselectedInputs(labels[0].target_BS, torch.ones(2, 64), torch.arange(128), torch.ones(1))
    for sent in (labels[0], chosen):
        received = from_tensors(to_tensors(sent))
        assert type(received) is type(sent) and all(a is b for a, b in zip(received, sent, strict=True))
