"""That losses are those of the model's own logits: computed both ways, on a few tokens, whenever a model is opened.

A loss is taken here from a decoder's hidden states and the weight of the head. Many models do more, under names that differ from
one to the next: they scale or cap logits, or hidden states before the head. Some let tokens see those after them. No list of such
names could be whole, so a teacher's losses are compared with those of its own `logits`, and a student's layers with the model
that transformers makes of the same configuration, with few and narrow layers and random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.student import LossHead, Student, hf_name

TOKENS = 16
SAME = 1e-3
"""Nats by which losses of the same hidden states may differ, besides what their logits are rounded to."""
ANEW = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Nats by which a loss may differ where the decoder has computed its hidden states twice, at the median."""
ANEW_16_BITS = 0.1
UNSEEN_16_BITS = 0.5
"""Nats by which later tokens may seem to move a loss: experts that are as good as one another are chosen by rounding."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Evidence:
    """Losses of a teacher on two rows that are the same in their first half, and padded in the second row's other half.

    own_BU      [2, U] nats, from the model's own logits
    head_BU     [2, U] from the hidden states that its head was given at that; None where it calls no head
    teacher_BU  [2, U] as they are scored
    rounding    nats by which the model rounds its own
    dtype       of the weights
    """

    own_BU: Tensor
    head_BU: Tensor | None
    teacher_BU: Tensor
    rounding: float
    dtype: torch.dtype

    def check(self, model_type: str) -> None:
        """Raises ModelError: they differ, or what follows a token reaches it."""
        kind, dtype = f"this {model_type} teacher", str(self.dtype).removeprefix("torch.")
        if self.teacher_BU.isnan().any():
            raise ModelError(f"the losses of {kind} are no numbers in {dtype}. Use teacher.dtype = 'bfloat16' or 'float32'.")
        if self.head_BU is not None:
            self._same(kind, self.head_BU, SAME + self.rounding, worst=True)
        self._same(kind, self.teacher_BU, ANEW.get(self.dtype, ANEW_16_BITS) + self.rounding, worst=False)
        before_U, after_U = self.teacher_BU[:, : self.teacher_BU.shape[1] // 2]
        moved_U = (before_U - after_U).abs()
        if moved_U.numel() and moved_U.max() > ANEW.get(self.dtype, UNSEEN_16_BITS):
            at = int(moved_U.argmax())
            raise ModelError(
                f"{kind} lets tokens see those after them, so it predicts none of them: the loss of a token is "
                f"{before_U[at]:.4f} nats, and {after_U[at]:.4f} with other tokens behind it"
            )

    def _same(self, kind: str, loss_BU: Tensor, bound: float, worst: bool) -> None:
        apart_BU = torch.where(self.own_BU == loss_BU, 0.0, (self.own_BU - loss_BU).abs())
        if (apart_BU.max() if worst else apart_BU.median()) <= bound:
            return
        at = int(apart_BU.argmax())
        raise ModelError(
            f"{kind} has other logits than its head makes of its hidden states, which is not supported: by its own the loss of "
            f"a token is {self.own_BU.flatten()[at]:.4f} nats, by its head {loss_BU.flatten()[at]:.4f}. "
            "Does it scale its logits, or cap them in a way of its own?"
        )


@torch.no_grad()
def probe(
    model: Any,
    score: Callable[[Tensor, Tensor], Tensor],
    head: LossHead,
    vocabulary: int,
    longest: int | None,
    device: torch.device,
) -> Evidence:
    """Both roads, on a few random tokens. Collective where the weights are sharded.

    model    of transformers
    score    (input_BU, target_BU) -> loss_BU, as the teacher scores

    Raises ModelError: the model does not run.
    """
    length = min(TOKENS, longest or TOKENS)
    stream_BU = torch.randint(vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0)).repeat(2, 1).to(device)
    bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        stream_BU[:, 0] = bos  # as all that it reads later begins
    input_BU, target_BU = stream_BU[:, :-1].clone(), stream_BU[:, 1:]
    input_BU[1, length // 2 :] = 0
    own_head = model.get_output_embeddings()
    model_type = model.config.get_text_config().model_type
    try:
        with _exact(own_head) as seen:
            logits_BUW = model(input_ids=input_BU, use_cache=False).logits
        teacher_BU = score(input_BU, target_BU)
    # whatever it is, a run would meet it at its first step
    except Exception as error:
        raise ModelError(f"this {model_type} teacher cannot read {length} tokens: {type(error).__name__}: {error}") from error
    if logits_BUW.shape[-1] < vocabulary:
        raise ModelError(
            f"this {model_type} teacher has {logits_BUW.shape[-1]:,} logits, and {vocabulary:,} tokens: it leaves some out"
        )
    rounded = logits_BUW.dtype if seen else head.weight.dtype
    rounding = 4 * torch.finfo(rounded).eps * logits_BUW.float().nan_to_num().clamp(-1e4, 1e4).abs().max()
    own_BU = F.cross_entropy(logits_BUW.float().flatten(0, 1), target_BU.flatten(), reduction="none").view(target_BU.shape)
    head_BU = head(seen[-1], target_BU) if seen and seen[-1].shape[:2] == target_BU.shape else None
    dtype = head.weight.dtype
    return Evidence(own_BU.cpu(), None if head_BU is None else head_BU.cpu(), teacher_BU.cpu(), float(rounding), dtype)


@contextmanager
def _exact(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the head multiplies in float32 whatever its own precision. Yields the hidden states that it was given."""
    seen: list[Tensor] = []

    def forward(hidden_BUH: Tensor) -> Tensor:
        seen.append(hidden_BUH)
        tiles = head.get_parameter("weight").split(ROWS_AT_ONCE)
        return torch.cat([F.linear(hidden_BUH.float(), tile.float()) for tile in tiles], dim=-1)

    if type(head) is nn.Linear:
        head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        head.__dict__.pop("forward", None)


# ---- the student ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def prove_student(config: PretrainedConfig) -> None:
    """That a student of this configuration is the model that transformers makes of it: its losses, with random weights.

    Raises ModelError.
    """
    small = _shrunk(config)
    try:
        with torch.random.fork_rng(devices=[]):
            student, reference = Student(small, seed=0), _reference(small)
        _same_weights(student, reference)
        ids_BS = torch.randint(small.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        target_BS = ids_BS.roll(-1, 1)
        ours_BS = student(ids_BS, target_BS)
        logits_BSV = reference(input_ids=ids_BS, use_cache=False).logits
    except ModelError:
        raise
    # whatever it is, it means that the classes of transformers do not take this configuration
    except Exception as error:
        raise ModelError(f"transformers cannot run a {config.model_type} student of this configuration: {error}") from error
    own_BS = F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="none").view(target_BS.shape)
    apart_BS = (own_BS - ours_BS).abs()
    if not apart_BS.max() <= SAME:
        at = int(apart_BS.argmax())
        raise ModelError(
            f"a {config.model_type} student of this configuration is not what transformers makes of it: in small, the loss of a "
            f"token is {own_BS.flatten()[at]:.4f} nats there, {ours_BS.flatten()[at]:.4f} here. Which of its fields is unusual?"
        )


def _shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """Few and narrow layers, one of each kind that it has. What is no size stays, and so does the width of heads, for RoPE."""
    small = copy.deepcopy(config)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    small.num_attention_heads, small.num_key_value_heads = 2, 2 if heads == shared else 1
    small.vocab_size, small.hidden_size, small.intermediate_size, small.pad_token_id = 64, 32, 32, None
    types = getattr(config, "layer_types", None)
    small.num_hidden_layers = 2
    if types is not None:
        small.layer_types = list(dict.fromkeys(types))
        small.num_hidden_layers = len(small.layer_types)
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = min(config.sliding_window, TOKENS // 3)
    return small


def _reference(config: PretrainedConfig) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("cpu"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def _same_weights(student: Student, reference: Any) -> None:
    """Random ones, so that no bias is 0 and no norm alike. Raises ModelError: the model of transformers has others."""
    generator = torch.Generator().manual_seed(1)
    named = {
        hf_name(student.config, i, name): parameter
        for i, layer in enumerate(student.layers)
        for name, parameter in layer.named_parameters()
    }
    for parameter in named.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    there = {id(parameter): name for name, parameter in reference.named_parameters()}
    found = reference.load_state_dict(named, strict=False)
    missing = set(found.missing_keys) & set(there.values())
    if missing or found.unexpected_keys:
        raise ModelError(
            f"a {student.config.model_type} student of this configuration is not the model of transformers, which has "
            f"{sorted(missing)[:3]} more and {sorted(found.unexpected_keys)[:3]} less"
        )
