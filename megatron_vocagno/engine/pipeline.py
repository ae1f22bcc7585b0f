"""The student as DeepSpeed's pipeline module: how its layers are dealt to stages, each of which makes its own and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from transformers import PretrainedConfig

from megatron_vocagno.config import Parallel
from megatron_vocagno.errors import RunError
from megatron_vocagno.model import student as model
from megatron_vocagno.model.folder import PretrainedWeights


def check_stages(parallel: Parallel, decoder_layers: int) -> None:
    """Refuse stages that a student of so many decoder layers cannot be cut into. Raises RunError."""
    stages, dealt = parallel.pipeline_stages, parallel.partition
    if stages > decoder_layers:
        raise RunError(f"parallel.pipeline_stages is {stages}, the student has {decoder_layers} decoder layers to deal to them")
    if isinstance(dealt, str):
        return
    if len(dealt) != stages:
        raise RunError(
            f"parallel.partition = {list(dealt)} deals layers to {len(dealt)} stages, parallel.pipeline_stages is {stages}"
        )
    if sum(dealt) != decoder_layers:
        raise RunError(
            f"parallel.partition = {list(dealt)} deals {sum(dealt)} decoder layers, the student has {decoder_layers}.\n"
            "  Embedding and head are not counted: they go to the first and the last stage."
        )


class StudentPipeline(PipelineModule):
    """DeepSpeed's module, but for how it weighs layers when it cuts them into stages, and for cuts that it is told."""

    def __init__(self, config: PretrainedConfig, layers: list[LayerSpec], **options: object) -> None:
        # not registered as an attribute before nn.Module is set up: DeepSpeed counts while it is
        self._count = partial(model.layer_parameters, config)
        super().__init__(layers, **options)

    def _partition_layers(self, method: str | tuple[int, ...] = "uniform") -> None:
        if isinstance(method, str):
            super()._partition_layers(method)
            return
        # decoder layers of each stage: the first begins with the embedding, the last ends with norm and head
        *ends, _ = (1 + count for count in accumulate(method))
        self.parts = [0, *ends, len(self._layer_specs)]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _count_layer_params(self) -> list[int]:
        """DeepSpeed would build every layer of the whole student on every rank, weights and all, to count its parameters."""
        return [self._count(index) for index in range(len(self._layer_specs))]


class _Spec(LayerSpec):
    """A layer that a stage builds only when it is the stage's own."""

    def __init__(self, kind: type[nn.Module], build: Callable[[], nn.Module]) -> None:
        super().__init__(kind)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class _TiedSpec(TiedLayerSpec):
    """The embedding, once on the first stage and, as the head, once on the last; DeepSpeed keeps the two the same."""

    def __init__(self, build: Callable[[], nn.Module], forward_fn: Callable[..., object] | None = None) -> None:
        super().__init__("embedding", model.Embedding, forward_fn=forward_fn, tied_weight_attr="weight")
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


def pipeline_layers(config: PretrainedConfig, seed: int, weights: PretrainedWeights | None, recompute: bool) -> list[LayerSpec]:
    """What to build for each layer: from the weights of its names, or from a seed of its own."""

    def build(index: int) -> nn.Module:
        layer = model.build_layer(config, index, seed, recompute)
        if weights is not None:
            model.load_layer(config, index, layer, weights)
        return layer

    decoders = [model.DecoderLayer] * config.num_hidden_layers
    kinds: list[type[nn.Module]] = [model.Embedding, *decoders, model.FinalNorm, model.Head]
    specs: list[LayerSpec] = [_Spec(kind, partial(build, index)) for index, kind in enumerate(kinds)]
    if config.tie_word_embeddings:
        specs[0] = _TiedSpec(partial(build, 0))
        specs[-1] = _TiedSpec(partial(build, 0), model.tied_head)
    return specs
