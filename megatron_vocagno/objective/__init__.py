"""Losses -> weights -> loss: the method itself, in torch. Nothing here knows a model, an engine, a file or the configuration.

    linear_ce.py    where the losses come from: one float32 loss a token out of hidden states and a head, no logits kept
      linear_ce_tiles.py         tile by tile of the vocabulary, in torch; linear_ce_triton.py  on a GPU
    selection.py    both models' losses -> which tokens the student learns from, in one call
      selection_triton.py        on a GPU; selection_kernels_triton.py  its kernels
      rule.py         what a selection is asked for, and what it answers
      ranking.py      the highest k of each group, exactly, over ranks as well
      statistics.py   what a selection did, as sums that add up
    guidance.py     the equation that the weights go into: the guided loss
    distance.py     what two baselines add to the loss instead: how far the student's distribution is from the teacher's

The order of use: `token_loss` of the teacher, `token_loss` of the student, `select_tokens`, `weighted_loss`; the backward of the
student's losses then visits the rows that the selection named. For loops that have losses already, `gather_guide` and
`guided_loss` are the same in two calls (docs/reference.md). What runs on a GPU in place of torch is in the files whose names end
in _triton; they are imported when a tensor of a GPU comes along, and not before. docs/method.md explains the method and what the
paper leaves open, docs/performance.md how it is computed.
"""

from megatron_vocagno.objective.guidance import GuidedLoss, guided_loss, weighted_loss
from megatron_vocagno.objective.linear_ce import LearnedRows, token_loss
from megatron_vocagno.objective.rule import Selection
from megatron_vocagno.objective.selection import gather_guide, planned_kept, select_tokens
from megatron_vocagno.objective.statistics import STATS, summarize

__all__ = [
    "STATS",
    "GuidedLoss",
    "LearnedRows",
    "Selection",
    "gather_guide",
    "guided_loss",
    "planned_kept",
    "select_tokens",
    "summarize",
    "token_loss",
    "weighted_loss",
]
