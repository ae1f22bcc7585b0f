"""Checks that losses match the logits of the model. Both are computed on a few tokens whenever a model is opened.

This project computes losses from a decoder's hidden states and the weight of the head. Many models do more: they scale or cap
logits, or scale hidden states before the head, under names that differ between models. In some models, tokens attend to later
tokens. No list of such features can be complete. A teacher's losses are therefore compared with the losses of its `logits`.
A student's layers are compared with the model that transformers makes from the same configuration, with few and narrow layers and
random weights.
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
"""Largest allowed difference of losses from the same hidden states, in nats, in addition to the rounding of the logits."""
RECOMPUTED = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest allowed median difference of losses, in nats, when the decoder computes its hidden states a second time."""
RECOMPUTED_16_BITS = 0.1
UNSEEN_16_BITS = 0.5
"""Largest allowed change of a loss, in nats, when later tokens change: rounding decides between experts of equal rank."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ProbeResult:
    """Losses of a teacher on two rows with the same first half. The second half of the second row is padding.

    own_BU      [2, U] nats, from the model's own logits
    head_BU     [2, U] nats, from the hidden states that the model's head received; None if the model does not call its head
    teacher_BU  [2, U] nats, as the teacher scores them
    rounding    nats by which rounding may change the model's own losses
    dtype       dtype of the weights
    """

    own_BU: Tensor
    head_BU: Tensor | None
    teacher_BU: Tensor
    rounding: float
    dtype: torch.dtype

    def check(self, model_type: str) -> None:
        """Raises ModelError: the losses differ, or a loss depends on later tokens."""
        kind, dtype = f"this {model_type} teacher", str(self.dtype).removeprefix("torch.")
        if self.teacher_BU.isnan().any():
            raise ModelError(f"the losses of {kind} are NaN in {dtype}. Use teacher.dtype = 'bfloat16' or 'float32'.")
        if self.head_BU is not None:
            self._same(kind, self.head_BU, SAME + self.rounding, worst=True)
        self._same(kind, self.teacher_BU, RECOMPUTED.get(self.dtype, RECOMPUTED_16_BITS) + self.rounding, worst=False)
        before_U, after_U = self.teacher_BU[:, : self.teacher_BU.shape[1] // 2]
        moved_U = (before_U - after_U).abs()
        if moved_U.numel() and moved_U.max() > RECOMPUTED.get(self.dtype, UNSEEN_16_BITS):
            at = int(moved_U.argmax())
            raise ModelError(
                f"{kind} is not causal, because a loss depends on later tokens: it is {before_U[at]:.4f} nats, and "
                f"{after_U[at]:.4f} with other tokens after it"
            )

    def _same(self, kind: str, loss_BU: Tensor, bound: float, worst: bool) -> None:
        apart_BU = torch.where(self.own_BU == loss_BU, 0.0, (self.own_BU - loss_BU).abs())
        if (apart_BU.max() if worst else apart_BU.median()) <= bound:
            return
        at = int(apart_BU.argmax())
        raise ModelError(
            f"the logits of {kind} are not its head applied to its hidden states, which is not supported: the loss of a token is "
            f"{self.own_BU.flatten()[at]:.4f} nats by its logits, and {loss_BU.flatten()[at]:.4f} by its head. Does it scale or "
            "cap its logits in an unusual way?"
        )


@torch.no_grad()
def probe(
    model: Any,
    score: Callable[[Tensor, Tensor], Tensor],
    head: LossHead,
    vocabulary: int,
    longest: int | None,
    device: torch.device,
) -> ProbeResult:
    """Compute losses on a few random tokens from the model's logits, from its head, and as the teacher scores them.

    Collective if the weights are sharded: all ranks must call it.

    model       model of transformers
    score       (input_BU, target_BU) -> loss_BU, as the teacher scores
    head        the teacher's head
    vocabulary  number of token ids
    longest     longest row that the model reads; None without a limit

    Raises ModelError: the model does not run, or has fewer logits than token ids.
    """
    length = min(TOKENS, longest or TOKENS)
    stream_BU = torch.randint(vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0)).repeat(2, 1).to(device)
    bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        stream_BU[:, 0] = bos  # all rows that the teacher reads later begin with it
    input_BU, target_BU = stream_BU[:, :-1].clone(), stream_BU[:, 1:]
    input_BU[1, length // 2 :] = 0
    own_head = model.get_output_embeddings()
    model_type = model.config.get_text_config().model_type
    try:
        with _float32_head(own_head) as seen:
            logits_BUW = model(input_ids=input_BU, use_cache=False).logits
        teacher_BU = score(input_BU, target_BU)
    # any error here would also occur at the first step of a run
    except Exception as error:
        raise ModelError(f"this {model_type} teacher cannot read {length} tokens: {type(error).__name__}: {error}") from error
    if logits_BUW.shape[-1] < vocabulary:
        raise ModelError(
            f"this {model_type} teacher has {logits_BUW.shape[-1]:,} logits, but {vocabulary:,} tokens: some would have no loss"
        )
    rounded = logits_BUW.dtype if seen else head.weight.dtype
    rounding = 4 * torch.finfo(rounded).eps * logits_BUW.float().nan_to_num().clamp(-1e4, 1e4).abs().max()
    own_BU = F.cross_entropy(logits_BUW.float().flatten(0, 1), target_BU.flatten(), reduction="none").view(target_BU.shape)
    head_BU = head(seen[-1], target_BU) if seen and seen[-1].shape[:2] == target_BU.shape else None
    dtype = head.weight.dtype
    return ProbeResult(own_BU.cpu(), None if head_BU is None else head_BU.cpu(), teacher_BU.cpu(), float(rounding), dtype)


@contextmanager
def _float32_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """In this context, the head multiplies in float32 for any dtype of its weight. Yields a list of its inputs."""
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
    """Check that a student of this configuration has the same losses as the model of transformers, with random weights.

    Raises ModelError.
    """
    small = shrunk(config)
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
    # any error means that the classes of transformers do not accept this configuration
    except Exception as error:
        raise ModelError(f"transformers cannot run a {config.model_type} student of this configuration: {error}") from error
    own_BS = F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="none").view(target_BS.shape)
    apart_BS = (own_BS - ours_BS).abs()
    if not apart_BS.max() <= SAME:
        at = int(apart_BS.argmax())
        raise ModelError(
            f"a {config.model_type} student of this configuration differs from the model of transformers: on a small model, the "
            f"loss of a token is {own_BS.flatten()[at]:.4f} nats there, {ours_BS.flatten()[at]:.4f} here. Does the configuration "
            "have an unusual field?"
        )


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with few and narrow layers, one of each type that the model has. Other fields stay as they are, and so
    does the width of a head, because RoPE depends on it.
    """
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
    """Give both models the same random weights, so that no bias is 0 and norms differ.

    Raises ModelError: the model of transformers has other weights.
    """
    generator = torch.Generator().manual_seed(1)
    named = {
        hf_name(student.config, i, name): parameter
        for i, layer in enumerate(student.layers)
        for name, parameter in layer.named_parameters()
    }
    for parameter in named.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    expected = {id(parameter): name for name, parameter in reference.named_parameters()}
    found = reference.load_state_dict(named, strict=False)
    missing = set(found.missing_keys) & set(expected.values())
    if missing or found.unexpected_keys:
        raise ModelError(
            f"a {student.config.model_type} student of this configuration differs from the model of transformers: it lacks the "
            f"weights {sorted(missing)[:3]} and has the weights {sorted(found.unexpected_keys)[:3]} in addition"
        )
