"""The student: a Hugging Face causal language model as a flat list of layers that a pipeline can cut anywhere, and back.

    layer 0        Embedding     ids_BS -> hidden_BSH
    layers 1 .. n  DecoderLayer  hidden_BSH -> hidden_BSH, one decoder layer of transformers
    layer n + 1    FinalNorm     hidden_BSH -> hidden_BSH
    layer n + 2    Head          hidden_BSH -> (hidden_BSH, weight_VH), from which the loss is computed without keeping logits

With document attention, the position of each token in its document is passed from layer to layer too, as (ids_BS, position_BS) ->
(hidden_BSH, position_BS), until FinalNorm drops it. Positions are integers, because DeepSpeed's pipeline expects a gradient for
every other tensor.

Any single layer can be built, named and loaded from (configuration, layer index, seed). Each pipeline stage therefore makes only
its own layers, and every split starts with the same weights. `Student` holds all layers in one module and computes the loss.
Layers share nothing else: each DecoderLayer computes its own RoPE and, if it needs one, its own mask.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.attention import layer_arguments
from megatron_vocagno.model.folder import PretrainedWeights, skeleton
from megatron_vocagno.objective.distance import Reference, distance
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss

# ---- layers --------------------------------------------------------------------------------------------------------

LayerInput = Tensor | tuple[Tensor, ...]
"""The value that is passed from layer to layer: a tensor, or with document attention (tensor, position_BS)."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The classes from which transformers builds a model of one type."""

    decoder: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    norm_start: float
    """The initial weight of a norm: 0 if the norm scales by 1 + weight."""
    scaled_embedding: bool
    """Whether embeddings are multiplied by sqrt(H)."""


@cache
def _parts(model_type: str) -> _Parts:
    model = skeleton(AutoConfig.for_model(model_type, num_hidden_layers=1)).model
    # on the CPU, even while layers are built on the meta device
    with torch.device("cpu"):
        norm_start = type(model.norm)(1).weight.item()
    scaled = hasattr(model.embed_tokens, "embed_scale")
    return _Parts(type(model.layers[0]), type(model.norm), type(model.rotary_emb), norm_start, scaled)


class Embedding(nn.Module):
    """Layer 0: token ids -> hidden states."""

    # no padding index: rows are packed, and it would freeze the embedding of a token that is often EOS too
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.scale: float | None = config.hidden_size**0.5 if _parts(config.model_type).scaled_embedding else None

    def forward(self, inputs: LayerInput) -> LayerInput:
        ids_BS, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        hidden_BSH = F.embedding(ids_BS, self.weight)
        if self.scale is not None:
            # the factor is rounded to the weights' precision, as in the training of these models
            hidden_BSH = hidden_BSH * float(torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu"))
        return (hidden_BSH, *positions) if positions else hidden_BSH


class Rotary(nn.Module):
    """RoPE of one decoder layer. Its frequencies follow the module to other devices, and stay float32 in any cast."""

    def __init__(self, config: PretrainedConfig, layer: int) -> None:
        super().__init__()
        # on the CPU, even while the weights around it are built on the meta device
        with torch.device("cpu"):
            self.rotary = _parts(config.model_type).rotary(config)
        # Gemma 3 has a separate RoPE for the layers with a sliding window
        by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.layer_type = {"layer_type": config.layer_types[layer]} if by_type else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        exact = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            # bfloat16 frequencies would be wrong by a third of a turn at position 2,048
            setattr(self.rotary, name, buffer.to(getattr(self.rotary, name).device))
        return self

    def forward(self, hidden_BSH: Tensor, position_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """position_BS: None for 0 .. S-1 in every row."""
        if position_BS is None:
            position_BS = torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device)[None]
        cos, sin = self.rotary(hidden_BSH, position_ids=position_BS, **self.layer_type)
        return cos, sin


class DecoderLayer(nn.Module):
    """A decoder layer of transformers, with its own RoPE and mask."""

    recompute = False
    """Keep only the inputs, and compute the layer again in the backward pass."""

    def __init__(self, config: PretrainedConfig, layer: int) -> None:
        super().__init__()
        self.config, self.index = config, layer
        self.layer = _parts(config.model_type).decoder(config, layer)
        self.positions = Rotary(config, layer)

    def forward(self, inputs: LayerInput) -> LayerInput:
        hidden_BSH, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.recompute:
            # a decoder layer uses no random numbers
            hidden_BSH = checkpoint(self._attend, hidden_BSH, *positions, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden_BSH = self._attend(hidden_BSH, *positions)
        return (hidden_BSH, *positions) if positions else hidden_BSH

    def _attend(self, hidden_BSH: Tensor, position_BS: Tensor | None = None) -> Tensor:
        out_BSH: Tensor = self.layer(
            hidden_BSH,
            position_embeddings=self.positions(hidden_BSH, position_BS),
            **layer_arguments(self.config, self.index, hidden_BSH, position_BS),
        )
        return out_BSH


class FinalNorm(nn.Module):
    """The norm before the head."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.norm = _parts(config.model_type).norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs: LayerInput) -> Tensor:
        out_BSH: Tensor = self.norm(inputs[0] if isinstance(inputs, tuple) else inputs)
        return out_BSH


class Head(nn.Module):
    """The last layer of a pipeline. It returns its weight together with the hidden states.

    The weight is returned as a view, not as the parameter. DeepSpeed adds hooks to a stage's outputs, which clear 16-bit
    gradients before the gradients of a backward pass arrive. If the parameter itself were an output, its gradient would arrive
    before the hooks run, and would be lost.
    """

    def __init__(self, weight_VH: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_BSH, self.weight.view_as(self.weight)


def tied_head(embedding: Embedding, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """The Head of a model with a tied head. A pipeline calls it with the last stage's copy of the Embedding."""
    return hidden_BSH, embedding.weight.view_as(embedding.weight)


class LossHead(nn.Module):
    """The last layer of a complete model. The loss is computed in the module that holds the weight, so that ZeRO-3 gathers it."""

    def __init__(self, weight_VH: nn.Parameter, softcap: float | None) -> None:
        """softcap: c, if logits are capped as c * tanh(logits / c)."""
        super().__init__()
        self.weight, self.softcap = weight_VH, softcap

    def forward(
        self, hidden_BSH: Tensor, target_BS: Tensor, selected: SelectedTokens | None = None, reference: Reference | None = None
    ) -> Tensor:
        """[B, S] float32, nats; 0 if the target is -100. selected: see token_loss.

        With a reference, the result is [2, B, S]: the losses, and the distances from the reference, 0 at other targets.
        """
        hidden_NH = hidden_BSH.flatten(0, 1)
        loss_N = token_loss(hidden_NH, self.weight, target_BS.flatten(), softcap=self.softcap, selected=selected)
        if reference is None:
            return loss_N.view(target_BS.shape)
        apart = distance(hidden_NH.index_select(0, reference.tokens_N), self.weight, self.softcap, reference)
        distance_N = torch.zeros_like(loss_N).index_copy(0, reference.tokens_N, apart)
        return torch.stack([loss_N, distance_N]).unflatten(1, target_BS.shape)


def logit_softcap(config: PretrainedConfig) -> float | None:
    """The c of a model with logits c * tanh(logits / c); None without a cap."""
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    return softcap


def layer_count(config: PretrainedConfig) -> int:
    """Number of layers of the student: its decoder layers, Embedding, FinalNorm and Head."""
    return int(config.num_hidden_layers) + 3


def build_layer(config: PretrainedConfig, i: int, seed: int, recompute: bool = False) -> nn.Module:
    """Layer i with random weights, float32 on the CPU. They depend only on (seed, i), and torch's global generators are not used.

    A tied head gets the values of the embedding. The caller must make the two one Parameter. recompute: see DecoderLayer.
    """
    layer = _empty_layer(config, i)
    layer.to_empty(device="cpu")
    if isinstance(layer, DecoderLayer):
        layer.recompute = recompute
    last = layer_count(config) - 1
    numbers_of = 0 if i == last and config.tie_word_embeddings else i
    _initialize(layer, config, torch.Generator().manual_seed(seed * 2**20 + numbers_of))
    return layer


def layer_parameters(config: PretrainedConfig, i: int) -> int:
    """Number of parameters of layer i, without allocating them. A tied head counts too, because its computation is the same."""
    return sum(parameter.numel() for parameter in _empty_layer(config, i).parameters())


def _empty_layer(config: PretrainedConfig, i: int) -> nn.Module:
    """Layer i on the meta device."""
    last = layer_count(config) - 1
    assert 0 <= i <= last, (i, last)
    with torch.device("meta"):
        if i == 0:
            return Embedding(config)
        if i < last - 1:
            return DecoderLayer(config, i - 1)
        if i == last - 1:
            return FinalNorm(config)
        return Head(nn.Parameter(torch.empty(config.vocab_size, config.hidden_size)))


@torch.no_grad()
def _initialize(layer: nn.Module, config: PretrainedConfig, generator: torch.Generator) -> None:
    """Initialize as transformers does: matrices normal(0, initializer_range), biases 0, norms with a scale of 1."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else _parts(config.model_type).norm_start)


# ---- names and weights ---------------------------------------------------------------------------------------------


def hf_name(config: PretrainedConfig, i: int, local_name: str) -> str:
    """Hugging Face's name of a parameter of layer i. A tied head has the name of the embedding."""
    last = layer_count(config) - 1
    if i == 0 or (i == last and config.tie_word_embeddings):
        return f"model.embed_tokens.{local_name}"
    if i < last - 1:
        return f"model.layers.{i - 1}.{local_name.removeprefix('layer.')}"
    return f"model.{local_name}" if i == last - 1 else f"lm_head.{local_name}"


@torch.no_grad()
def load_layer(config: PretrainedConfig, i: int, layer: nn.Module, weights: PretrainedWeights) -> None:
    """Copy layer i of a pretrained model into `layer`, in the dtype of `layer`.

    Raises ModelError: a tensor is missing, or has another shape. weights.py checks that no tensor is unused.
    """
    names = {hf_name(config, i, local_name): parameter for local_name, parameter in layer.named_parameters()}
    for name, parameter in names.items():
        _check_tensor(name, tuple(parameter.shape), weights)
        parameter.copy_(weights.tensor(name))


def _check_tensor(name: str, shape: tuple[int, ...], weights: PretrainedWeights) -> None:
    if name not in weights:
        hint = " Does it tie head and embedding (tie_word_embeddings)?" if name.startswith("lm_head") else ""
        raise ModelError(f"{weights.folder} has no tensor {name}: its model does not match the configuration.{hint}")
    found = weights.shape(name)
    if found == shape:
        return
    if name.startswith(("model.embed_tokens", "lm_head")) and found[1:] == shape[1:]:
        raise ModelError(
            f"vocabulary mismatch at {name}: {weights.folder} has {found[0]:,} tokens {found}, the student {shape[0]:,} {shape}. "
            "Use the vocabulary size of the pretrained weights."
        )
    raise ModelError(
        f"shape mismatch at {name}: {weights.folder} has {found}, the student {shape}. Do the configurations differ?"
    )


# ---- the whole model -----------------------------------------------------------------------------------------------


class Student(nn.Module):
    """All layers in one module, for engines without a pipeline. Its parameters are `layers.<i>.<local name>`."""

    def __init__(self, config: PretrainedConfig, seed: int, recompute: bool = False) -> None:
        """recompute: see DecoderLayer."""
        super().__init__()
        self.config = config
        *body, head = [build_layer(config, i, seed, recompute) for i in range(layer_count(config))]
        source = body[0] if config.tie_word_embeddings else head
        assert isinstance(source, Embedding | Head)
        self.layers = nn.ModuleList([*body, LossHead(source.weight, logit_softcap(config))])

    def load(self, weights: PretrainedWeights) -> None:
        """Load the weights of every layer. Raises ModelError: see load_layer."""
        for i, layer in enumerate(self.layers):
            load_layer(self.config, i, layer, weights)

    def forward(
        self, inputs: LayerInput, target_BS: Tensor, selected: SelectedTokens | None = None, reference: Reference | None = None
    ) -> Tensor:
        """Losses, [B, S] float32, nats, 0 if the target is -100; with a reference [2, B, S], see LossHead.

        inputs     ids_BS [B, S] int64; or (ids_BS, position_BS), see attention.document_positions
        target_BS  [B, S] int64, the target of position i being token i + 1
        selected   which of the B * S tokens are learned, set before the backward. Without it, the backward reads the gradient
        """
        *body, head = self.layers
        for layer in body:
            inputs = layer(inputs)
        losses: Tensor = head(inputs, target_BS, selected, reference)
        return losses
