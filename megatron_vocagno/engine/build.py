"""Model + objective -> engine: the pipeline, or the plain engine with ZeRO-1/2/3, behind one door.

Both take the micro-batches of a step with their guides, learn from them, and count what they did; the loop that drives them
cannot tell them apart. The student is the same list of layers in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_vocagno.batch.loader import IGNORE, Batch, Layout
from megatron_vocagno.config import Guidance, Run, Schedule
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.settings import Settings
from megatron_vocagno.model import student as model
from megatron_vocagno.model.folder import PretrainedWeights
from megatron_vocagno.objective.guidance import STATS, GuidedLoss, clm_loss, guided_loss
from megatron_vocagno.objective.linear_ce import token_loss

Labels = tuple[Tensor, Tensor, Tensor]
"""target_BS int64, guide_BS float32 (NaN where unmapped), divisor [1] float32."""


class Objective:
    """Per-token losses and labels -> the loss of a micro-batch. Adds up what it saw until it is asked."""

    def __init__(self, guidance: Guidance, device: torch.device) -> None:
        self.guidance, self.device = guidance, device
        self.group: dist.ProcessGroup | None = None
        """The data-parallel ranks, over which `global` scope selects; known once the engine is built."""
        self.learning = True
        """False while evaluating: every target counts, whatever the guidance."""
        self._seen = torch.zeros(len(STATS), dtype=torch.float64, device=device)

    def __call__(self, loss_BS: Tensor, labels: Labels) -> Tensor:
        target_BS, guide_BS, divisor = labels
        valid_BS = target_BS != IGNORE
        if not self.learning:
            return clm_loss(loss_BS, valid_BS, normalizer=divisor.squeeze()).loss
        result = self._learn(loss_BS, guide_BS, valid_BS, divisor.squeeze())
        self._seen += result.stats
        return result.loss

    def of_hidden_states(self, outputs: tuple[Tensor, Tensor], labels: Labels) -> Tensor:
        """The same from what a pipeline's last stage gives: hidden states and head, so that no logits are kept."""
        hidden_BSH, head_VH = outputs
        target_BS = labels[0]
        loss_N = token_loss(hidden_BSH.flatten(0, 1), head_VH, target_BS.flatten(), ignore_index=IGNORE)
        return self(loss_N.view_as(target_BS), labels)

    def _learn(self, loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, divisor: Tensor) -> GuidedLoss:
        g = self.guidance
        if g.objective == "clm":
            return clm_loss(loss_BS, valid_BS, normalizer=divisor)
        return guided_loss(
            loss_BS,
            guide_BS,
            valid_BS,
            keep=g.keep,
            scope=g.scope,
            unmapped=g.unmapped,
            require_positive=g.require_positive,
            group=self.group,
            normalizer=divisor,
        )

    def take_stats(self) -> Tensor:
        """Sums since the last call, over all ranks, in the order of STATS. Collective over the world."""
        seen, self._seen = self._seen, torch.zeros_like(self._seen)
        dist.all_reduce(seen)
        return seen


class Engine(ABC):
    """A DeepSpeed engine as the loop sees it."""

    data_rank: int
    """Which of the data-parallel shares this rank reads."""
    data_group: dist.ProcessGroup
    """The ranks that read different rows."""
    pipe_group: dist.ProcessGroup | None
    """The ranks that read the same rows; None where each reads its own."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        self.engine, self.objective, self.layout = engine, objective, layout

    @abstractmethod
    def train(self, batches: Sequence[Batch], guides: Sequence[Tensor], divisor: float) -> float:
        """One optimizer step on the micro-batches of this rank; the loss that was learned, over all ranks.

        divisor: tokens that count, over all ranks.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum of the losses of all targets of all ranks, nats."""

    @abstractmethod
    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """This rank's layers with their place in the whole student; a tied head is not told again."""

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def grad_norm(self) -> float | None:
        """Of the last step, before clipping; None where DeepSpeed did not take it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that DeepSpeed left the weights alone."""
        return int(self.engine.skipped_steps)

    def write_weights(self, folder: Path, config: PretrainedConfig) -> None:
        """One safetensors file a layer, under Hugging Face names. Collective; the first data-parallel rank writes."""
        for index, layer in self.layers():
            named = dict(layer.named_parameters())
            with deepspeed.zero.GatheredParameters([p for p in named.values() if hasattr(p, "ds_id")]):
                if self.data_rank == 0 and named:
                    tensors = {model.hf_name(config, index, name): p.detach().cpu().contiguous() for name, p in named.items()}
                    save_file(tensors, folder / f"layer_{index:04d}.safetensors")

    def _scale(self, divisor: float) -> Tensor:
        """The divisor of one micro-batch's loss: DeepSpeed takes the mean over micro-batches and data-parallel ranks."""
        parts = self.layout.micro_batches * self.layout.data_parallel
        return torch.tensor([divisor / parts], dtype=torch.float32)


class PipelineTrainer(Engine):
    """The student over several stages, ZeRO-1."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        super().__init__(engine, objective, layout)
        self.data_rank = engine.grid.get_data_parallel_rank()
        self.data_group = engine.grid.get_data_parallel_group()
        self.pipe_group = engine.grid.get_pipe_parallel_group()
        objective.group = self.data_group

    def train(self, batches: Sequence[Batch], guides: Sequence[Tensor], divisor: float) -> float:
        return float(self.engine.train_batch(self._items(batches, guides, divisor)))

    def evaluate(self, batches: Sequence[Batch]) -> float:
        guides = [torch.full_like(batch.target_BS, float("nan"), dtype=torch.float32) for batch in batches]
        self.objective.learning = False
        total = self.engine.eval_batch(self._items(batches, guides, 1.0))
        self.objective.learning = True
        return float(total)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        start = self.engine.module._local_start
        for place, layer in enumerate(self.engine.module.forward_funcs):
            if isinstance(layer, nn.Module):
                yield start + place, layer

    def _items(self, batches: Sequence[Batch], guides: Sequence[Tensor], divisor: float) -> Iterator[tuple[Tensor, Labels]]:
        for batch, guide_BS in zip(batches, guides, strict=True):
            yield batch.input_BS, (batch.target_BS, guide_BS, self._scale(divisor))


class PlainTrainer(Engine):
    """The whole student on every rank, ZeRO-0 to 3."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        super().__init__(engine, objective, layout)
        self.data_rank = dist.get_rank()
        self.data_group = dist.get_world_group()
        self.pipe_group = None
        objective.group = self.data_group

    def train(self, batches: Sequence[Batch], guides: Sequence[Tensor], divisor: float) -> float:
        self.engine.train()
        total = torch.zeros((), device=self.engine.device)
        for batch, guide_BS in zip(batches, guides, strict=True):
            loss = self._loss(batch, guide_BS, divisor)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return self._mean(total)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        self.engine.eval()
        self.objective.learning = False
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            no_guide_BS = torch.full_like(batch.target_BS, float("nan"), dtype=torch.float32)
            total += self._loss(batch, no_guide_BS, 1.0)
        self.objective.learning = True
        return self._mean(total)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        student = self.engine.module
        told: set[int] = set()
        for place, layer in enumerate(student.layers):
            if not all(id(parameter) in told for parameter in layer.parameters()):
                yield place, layer
            told.update(id(parameter) for parameter in layer.parameters())

    def _mean(self, total: Tensor) -> float:
        """Over micro-batches and ranks, as the pipeline engine reports it."""
        dist.all_reduce(total)
        return float(total) / (self.layout.micro_batches * self.layout.data_parallel)

    def _loss(self, batch: Batch, guide_BS: Tensor, divisor: float) -> Tensor:
        device = self.engine.device
        target_BS = batch.target_BS.to(device)
        loss_BS = self.engine(batch.input_BS.to(device), target_BS)
        return self.objective(loss_BS, (target_BS, guide_BS.to(device), self._scale(divisor).to(device)))


def build_engine(
    run: Run,
    settings: Settings,
    config: PretrainedConfig,
    weights: PretrainedWeights | None,
    layout: Layout,
    steps: int,
    processes: Processes,
) -> Engine:
    """The student, from weights or from the seed, in the engine that the run asks for. Collective over the world."""
    stages = run.parallel.pipeline_stages
    objective = Objective(run.guidance, processes.device)
    if stages:
        interval = settings.get("pipeline", {}).get("activation_checkpoint_interval", 0)
        # DeepSpeed copies tied weights between stages here, which autograd would otherwise record and warn of
        with torch.no_grad():
            module: nn.Module = StudentPipeline(
                config,
                _pipeline_layers(config, run.training.seed, weights),
                num_stages=stages,
                loss_fn=objective.of_hidden_states,
                activation_checkpoint_interval=interval,
                checkpointable_layers=[model.Decoder.__name__],
            )
    else:
        module = model.Student(config, run.training.seed)
        if weights is not None:
            module.load(weights)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=_parameter_groups(module, settings["optimizer"].get("params", {}).get("weight_decay", 0.0)),
        lr_scheduler=partial(_scheduler, run.training.schedule, steps),
        config=settings
        | {
            "train_batch_size": layout.rows,
            "train_micro_batch_size_per_gpu": layout.micro_batch_rows,
            "gradient_accumulation_steps": layout.micro_batches,
        },
        dist_init_required=False,
    )
    return PipelineTrainer(engine, objective, layout) if stages else PlainTrainer(engine, objective, layout)


class StudentPipeline(PipelineModule):
    """DeepSpeed's module, but for how it weighs layers when it cuts them into stages."""

    def __init__(self, config: PretrainedConfig, layers: list[LayerSpec], **options: object) -> None:
        # not registered as an attribute before nn.Module is set up: DeepSpeed counts while it is
        self._count = partial(model.layer_parameters, config)
        super().__init__(layers, **options)

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


def _pipeline_layers(config: PretrainedConfig, seed: int, weights: PretrainedWeights | None) -> list[LayerSpec]:
    def build(index: int) -> nn.Module:
        layer = model.build_layer(config, index, seed)
        if weights is not None:
            model.load_layer(config, index, layer, weights)
        return layer

    decoders = [model.Decoder] * config.num_hidden_layers
    kinds: list[type[nn.Module]] = [model.Embedding, *decoders, model.FinalNorm, model.Head]
    specs: list[LayerSpec] = [_Spec(kind, partial(build, index)) for index, kind in enumerate(kinds)]
    if config.tie_word_embeddings:
        specs[0] = _TiedSpec(partial(build, 0))
        specs[-1] = _TiedSpec(partial(build, 0), model.tied_head)
    return specs


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _scheduler(schedule: Schedule, steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_peak, schedule, steps))


def share_of_peak(schedule: Schedule, steps: int, step: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a share of the peak."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps))
    fall = progress if schedule.kind == "linear" else (1 - torch.cos(torch.tensor(torch.pi * progress)).item()) / 2
    return 1 - (1 - schedule.final) * fall
