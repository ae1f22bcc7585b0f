"""Losses -> weights -> loss: the method itself, in torch. Imports no model, engine or configuration, opens no file.

    linear_ce.py    one float32 loss per token from hidden states and a head; no logits are kept
      linear_ce_tiles.py   the work on one tile of the vocabulary, in torch; linear_ce_triton.py  on a GPU
    selection.py    losses of both models -> the weights of the tokens that the student learns from, in one call
      selection_triton.py  on a GPU; selection_kernels_triton.py  its kernels
      rule.py         input and result of a selection
      chunks.py       the losses of both models over the stretches of text that both tokenizers cut alike
      ranking.py      the k highest tokens of each group, exactly, also over ranks
      weighting.py    weights that need no ranking: a threshold, a control variate
      statistics.py   statistics of a selection, as sums that add up
    guidance.py     the guided loss: the loss of the selected tokens
    distance.py     added to the loss by two baselines: the distance between the student's and the teacher's distributions

Call `token_loss` for the teacher, `token_loss` for the student, `select_tokens`, `SelectedTokens.set` and `weighted_loss`, in
this order. The backward of the student's losses then computes the selected tokens only. If you have the losses of both models
already, call `guided_loss` instead (docs/reference.md). Files whose names end in _triton contain the GPU backend. They are
imported with the first GPU tensor. docs/method.md explains the method and the choices that the paper leaves open.
docs/performance.md explains how it is computed.
"""

from megatron_vocagno.objective.guidance import guided_loss, weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.objective.statistics import summarize

__all__ = [
    "Rule",
    "SelectedTokens",
    "guided_loss",
    "planned_kept",
    "select_tokens",
    "summarize",
    "token_loss",
    "weighted_loss",
]
