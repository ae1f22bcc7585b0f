"""The student: a Hugging Face causal language model as a flat list of layers that a pipeline can cut anywhere, and back.

    layer 0        Embedding    ids_BS -> hidden_BSH
    layers 1 .. n  DecoderLayer      hidden_BSH -> hidden_BSH, one decoder layer of transformers
    layer n + 1    FinalNorm    hidden_BSH -> hidden_BSH
    layer n + 2    Head         hidden_BSH -> (hidden_BSH, weight_VH): the loss takes these two, logits are never kept

With document attention the positions of tokens in their documents go along, (ids_BS, position_BS) -> (hidden_BSH, position_BS)
and so on, until FinalNorm drops them. They are integers: DeepSpeed's pipeline expects a gradient of every other tensor.

Any layer can be built, named and loaded alone, from (configuration, layer index, seed), so that each pipeline stage makes
only its own and every split begins with the same numbers. `Student` is all of them in one module, with the loss inside.
Nothing else crosses layers: each DecoderLayer makes its own RoPE, and its own mask where it needs one.
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
"""What goes from layer to layer: a tensor alone, or with document attention (that tensor, position_BS)."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The classes that transformers builds a model of one type from."""

    decoder: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    norm_start: float
    """The weight with which a norm begins: 0 where it scales by 1 + weight."""
    scaled_embedding: bool
    """Embeddings times sqrt(H)."""


@cache
def _parts(model_type: str) -> _Parts:
    model = skeleton(AutoConfig.for_model(model_type, num_hidden_layers=1)).model
    # real even while layers are built on the meta device
    with torch.device("cpu"):
        norm_start = type(model.norm)(1).weight.item()
    scaled = hasattr(model.embed_tokens, "embed_scale")
    return _Parts(type(model.layers[0]), type(model.norm), type(model.rotary_emb), norm_start, scaled)


class Embedding(nn.Module):
    """Layer 0: token ids -> hidden states."""

    # no padding index: rows are packed, and it would freeze the row of a token that is often EOS as well
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.scale: float | None = config.hidden_size**0.5 if _parts(config.model_type).scaled_embedding else None

    def forward(self, inputs: LayerInput) -> LayerInput:
        ids_BS, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        hidden_BSH = F.embedding(ids_BS, self.weight)
        if self.scale is not None:
            # as the models were trained: the factor itself is rounded to the weights' precision
            hidden_BSH = hidden_BSH * float(torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu"))
        return (hidden_BSH, *positions) if positions else hidden_BSH


class Rotary(nn.Module):
    """RoPE of one decoder layer. Its frequencies move between devices and keep their float32 values through any cast."""

    def __init__(self, config: PretrainedConfig, layer: int) -> None:
        super().__init__()
        # real values even while the weights around it are built on the meta device
        with torch.device("cpu"):
            self.rotary = _parts(config.model_type).rotary(config)
        # Gemma 3 has a RoPE of its own for the layers with a window
        by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.layer_type = {"layer_type": config.layer_types[layer]} if by_type else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        exact = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            # bfloat16 frequencies are off by a third of a turn at position 2,048
            setattr(self.rotary, name, buffer.to(getattr(self.rotary, name).device))
        return self

    def forward(self, hidden_BSH: Tensor, position_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """position_BS: None for 0 .. S-1 in every row."""
        if position_BS is None:
            position_BS = torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device)[None]
        cos, sin = self.rotary(hidden_BSH, position_ids=position_BS, **self.layer_type)
        return cos, sin


class DecoderLayer(nn.Module):
    """A decoder layer of transformers, with RoPE and mask of its own."""

    recompute = False
    """Keep the inputs alone, and compute the layer again in the backward pass."""

    def __init__(self, config: PretrainedConfig, layer: int) -> None:
        super().__init__()
        self.config, self.index = config, layer
        self.layer = _parts(config.model_type).decoder(config, layer)
        self.positions = Rotary(config, layer)

    def forward(self, inputs: LayerInput) -> LayerInput:
        hidden_BSH, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.recompute:
            # nothing in a decoder layer is random
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
    """The last layer of a pipeline: hands its weight on beside the hidden states.

    Hands on a view, not the parameter itself: DeepSpeed hooks into a stage's outputs, to clear 16-bit gradients before those of
    a backward pass arrive. The gradient of a parameter that is no output's ancestor arrives before, and would be lost.
    """

    def __init__(self, weight_VH: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_BSH, self.weight.view_as(self.weight)


def tied_head(embedding: Embedding, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """The Head of a model whose head is its embedding: what a pipeline calls on its last stage's copy of the Embedding."""
    return hidden_BSH, embedding.weight.view_as(embedding.weight)


class LossHead(nn.Module):
    """The last layer of a whole model. The loss is taken where the weight lives, so that ZeRO-3 gathers it."""

    def __init__(self, weight_VH: nn.Parameter, softcap: float | None) -> None:
        """softcap: c, where logits become c * tanh(logits / c)."""
        super().__init__()
        self.weight, self.softcap = weight_VH, softcap

    def forward(
        self, hidden_BSH: Tensor, target_BS: Tensor, selected: SelectedTokens | None = None, reference: Reference | None = None
    ) -> Tensor:
        """[B, S] float32, nats; 0 if the target is -100. selected: see token_loss.

        With a reference [2, B, S]: the losses, and the distances from it, 0 at targets that it says nothing of.
        """
        hidden_NH = hidden_BSH.flatten(0, 1)
        loss_N = token_loss(hidden_NH, self.weight, target_BS.flatten(), softcap=self.softcap, selected=selected)
        if reference is None:
            return loss_N.view(target_BS.shape)
        apart = distance(hidden_NH.index_select(0, reference.tokens_N), self.weight, self.softcap, reference)
        distance_N = torch.zeros_like(loss_N).index_copy(0, reference.tokens_N, apart)
        return torch.stack([loss_N, distance_N]).unflatten(1, target_BS.shape)


def logit_softcap(config: PretrainedConfig) -> float | None:
    """The c of a model whose logits are c * tanh(logits / c)."""
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    return softcap


def layer_count(config: PretrainedConfig) -> int:
    """Of the whole student: its decoder layers, and Embedding, FinalNorm and Head."""
    return int(config.num_hidden_layers) + 3


def build_layer(config: PretrainedConfig, i: int, seed: int, recompute: bool = False) -> nn.Module:
    """Layer i with random weights that depend on (seed, i) alone, float32 on the CPU; leaves torch's own generators alone.

    A tied head gets the embedding's numbers; making the two one Parameter is left to the caller. recompute: see DecoderLayer.
    """
    layer = _empty_layer(config, i)
    layer.to_empty(device="cpu")
    if isinstance(layer, DecoderLayer):
        layer.recompute = recompute
    last = layer_count(config) - 1
    numbers_of = 0 if i == last and config.tie_word_embeddings else i
    _initialise(layer, config, torch.Generator().manual_seed(seed * 2**20 + numbers_of))
    return layer


def layer_parameters(config: PretrainedConfig, i: int) -> int:
    """How many parameters layer i has, without making them. A tied head counts them too: its work is the same."""
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
def _initialise(layer: nn.Module, config: PretrainedConfig, generator: torch.Generator) -> None:
    """As transformers does: matrices normal(0, initializer_range), biases 0, the weights of norms so that they scale by 1."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, config.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else _parts(config.model_type).norm_start)


# ---- names and weights ---------------------------------------------------------------------------------------------


def hf_name(config: PretrainedConfig, i: int, local_name: str) -> str:
    """Hugging Face's name of a parameter of layer i. A tied head has the embedding's."""
    last = layer_count(config) - 1
    if i == 0 or (i == last and config.tie_word_embeddings):
        return f"model.embed_tokens.{local_name}"
    if i < last - 1:
        return f"model.layers.{i - 1}.{local_name.removeprefix('layer.')}"
    return f"model.{local_name}" if i == last - 1 else f"lm_head.{local_name}"


@torch.no_grad()
def load_layer(config: PretrainedConfig, i: int, layer: nn.Module, weights: PretrainedWeights) -> None:
    """Copy layer i of a pretrained model into `layer`, in the layer's own dtype.

    Raises ModelError: a tensor is missing, or has another shape. That none is left over: weights.py.
    """
    names = {hf_name(config, i, local_name): parameter for local_name, parameter in layer.named_parameters()}
    for name, parameter in names.items():
        _check_tensor(name, tuple(parameter.shape), weights)
        parameter.copy_(weights.tensor(name))


def _check_tensor(name: str, shape: tuple[int, ...], weights: PretrainedWeights) -> None:
    if name not in weights:
        hint = " Does it tie head and embedding (tie_word_embeddings)?" if name.startswith("lm_head") else ""
        raise ModelError(f"{weights.folder} has no tensor {name}: its model is another one than the configuration.{hint}")
    found = weights.shape(name)
    if found == shape:
        return
    if name.startswith(("model.embed_tokens", "lm_head")) and found[1:] == shape[1:]:
        raise ModelError(
            f"vocabulary mismatch at {name}: {weights.folder} has {found[0]:,} tokens {found}, the student {shape[0]:,} {shape}. "
            "Pretrained weights need their own vocabulary size."
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
        """Every layer's weights. Raises ModelError: see load_layer."""
        for i, layer in enumerate(self.layers):
            load_layer(self.config, i, layer, weights)

    def forward(
        self, inputs: LayerInput, target_BS: Tensor, selected: SelectedTokens | None = None, reference: Reference | None = None
    ) -> Tensor:
        """Losses, [B, S] float32, nats, 0 where the target is -100; with a reference [2, B, S], see LossHead.

        inputs     ids_BS [B, S] int64; or (ids_BS, position_BS), see attention.document_positions
        target_BS  [B, S] int64, the target of position i being token i + 1
        selected   which of the B * S tokens are learned, set before the backward. Without it, the backward reads the gradient
        """
        *body, head = self.layers
        for layer in body:
            inputs = layer(inputs)
        losses: Tensor = head(inputs, target_BS, selected, reference)
        return losses
