"""The student as DeepSpeed's pipeline module. Layers are assigned to stages, and each stage builds only its own layers."""

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
    """Raises RunError if a student with `decoder_layers` layers cannot be divided into the configured stages."""
    stages, partition = parallel.pipeline_stages, parallel.partition
    if stages > decoder_layers:
        raise RunError(f"parallel.pipeline_stages is {stages}, but the student has only {decoder_layers} decoder layers")
    if isinstance(partition, str):
        return
    if len(partition) != stages:
        raise RunError(
            f"parallel.partition = {list(partition)} is for {len(partition)} stages, parallel.pipeline_stages is {stages}"
        )
    if sum(partition) != decoder_layers:
        raise RunError(
            f"parallel.partition = {list(partition)} assigns {sum(partition)} decoder layers, the student has {decoder_layers}.\n"
            "  Do not count embedding and head: they belong to the first and the last stage."
        )


class StudentPipeline(PipelineModule):
    """DeepSpeed's module with its own parameter counts for the partition, and with partitions that are given as a list."""

    def __init__(self, config: PretrainedConfig, layers: list[LayerSpec], **options: object) -> None:
        # DeepSpeed counts parameters in its __init__. A partial can be set before nn.Module is initialized, a module cannot
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
        """Overridden because DeepSpeed would build every layer of the student on every rank to count its parameters."""
        return [self._count(index) for index in range(len(self._layer_specs))]


class _Spec(LayerSpec):
    """A layer that only its own stage builds."""

    def __init__(self, kind: type[nn.Module], build: Callable[[], nn.Module]) -> None:
        super().__init__(kind)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


class _TiedSpec(TiedLayerSpec):
    """The embedding on the first stage, and the same weight as the head on the last stage. DeepSpeed keeps both equal."""

    def __init__(self, build: Callable[[], nn.Module], forward_fn: Callable[..., object] | None = None) -> None:
        super().__init__("embedding", model.Embedding, forward_fn=forward_fn, tied_weight_attr="weight")
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return self._build()


def pipeline_layers(config: PretrainedConfig, seed: int, weights: PretrainedWeights | None, recompute: bool) -> list[LayerSpec]:
    """A spec per layer, which builds it from pretrained weights or else from a seed that depends on the layer."""

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
