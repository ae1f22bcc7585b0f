"""The configuration of a run: one frozen model per section of the run file. `run_file.py` reads the file.

A field's docstring is its documentation: docs/fields.py writes the table in docs/training.md from it.

The DeepSpeed configuration (`ds_configs/*.json`) sets batch sizes, precision, the optimizer with its peak learning rate, gradient
clipping and the ZeRO stage. The run file repeats none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from typing_extensions import Self

from megatron_vocagno.errors import tool

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]
Unit = Literal["token", "chunk"]
Weighting = Literal["top_k", "threshold", "control_variate"]
Attention = Literal["auto", "sdpa", "flash_attention_2"]
Bos = Literal["auto", "none"] | Annotated[int, Field(ge=0)]
Objective = Literal["guided", "clm", "random", "student", "uld", "kld"]
Quantization = Literal["none", "int8", "fp8"]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A section of the run file. It is frozen and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """A dataset of a blend."""

    path: Path
    """Folder of the dataset."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The dataset's share of the rows is this weight divided by the sum of all weights."""


class Data(Section):
    """Aligned datasets, made by `tools.preprocess.build_dataset`."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Path of the dataset to train on.

    For a blend, write one table `[[data.train]]` per dataset, with `path` and `weight` (default 1): docs/training.md#blends.
    """
    valid: Path | None = None
    """Path of the dataset to evaluate on. It must be made with the same two tokenizers as `data.train`."""
    row_length: Annotated[int, Field(ge=32)] = 2048
    """Student tokens per row (S). A row is a packed sequence, and the count includes the BOS that the student reads.
    About 8 positions of each row stay free.
    """
    attention: Literal["row", "document"] = "row"
    """The tokens that a token attends to, in both models.

    `row`: all earlier tokens in its row.
    `document`: only the earlier tokens in its document.
    """

    def paths(self) -> list[tuple[str, Path]]:
        """The fields that name a dataset, each with its path."""
        return [("data.train", source.path) for source in self.train] + ([("data.valid", self.valid)] if self.valid else [])

    @property
    def by_document(self) -> bool:
        """Whether attention stops at document borders."""
        return self.attention == "document"

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, train: Any) -> Any:
        return [{"path": train}] if isinstance(train, str | Path) else train


class Student(Section):
    """The model to train. Give either pretrained weights or a configuration."""

    pretrained: Path | None = None
    """A Hugging Face folder with safetensors to continue training from, or a Hub id: docs/training.md#models-from-the-hub.

    A GGUF file must be converted first: docs/teachers.md#gguf-files.
    """
    config: dict[str, Any] | None = None
    """Fields of a Hugging Face configuration, to train from scratch. `model_type` is required.

    If `vocab_size` is missing, it is taken from the data.
    """
    bos: Bos = "auto"
    """Ids that the student reads at the start of each row: docs/method.md#the-prefix-that-a-model-reads.

    `auto`: the ids that its own tokenizer puts before a text.
    `none`: nothing.
    A number: that id.
    """
    attention: Attention = "auto"
    """Attention implementation. `auto` uses FlashAttention 2 if it is installed and supports the device and precision, else SDPA.

    See docs/training.md#models-and-attention.
    """

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("give exactly one of 'pretrained' (continue from weights) and 'config' (train from scratch)")
        return self


class Teacher(Section):
    """The frozen model that guides the student."""

    path: Path | None = None
    """A Hugging Face folder with safetensors, a Hub id, or a GGUF file that is converted once: docs/teachers.md#which-models."""
    data: tuple[Path, ...] = ()
    """Only for the second and each further teacher: the datasets of `data.train`, in the same order, aligned for this teacher.

    See docs/teachers.md#several-teachers.
    """
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the teacher's forward pass."""
    quantization: Quantization = "none"
    """8-bit weights for the linear layers of the decoder, by torchao: docs/teachers.md#precision-and-8-bits."""
    placement: Literal["replicated", "zero3", "cached"] = "replicated"
    """Source of the teacher's losses: docs/teachers.md#placement.

    `replicated`: every rank holds the teacher. The ranks of one pipeline share the rows of a step.
    `zero3`: the weights are sharded over all ranks and gathered layer by layer.
    `cached`: `tools.preprocess.score_teacher` has stored the losses next to the data. No teacher is loaded.
    """
    bos: Bos = "auto"
    """Ids that the teacher reads at the start of each row or window. The values are those of `student.bos`."""
    tokens_per_batch: PositiveInt = 16384
    """Upper bound for the tokens of one teacher forward pass, padding included.

    It limits memory and does not change results beyond rounding.
    """
    attention: Attention = "auto"
    """Attention implementation, as in `student.attention`."""


class Guidance(Section):
    """The method: which of the student's losses count. See docs/method.md."""

    objective: Objective = "guided"
    """`guided` is the method. The other values are baselines to compare it with: docs/method.md#baselines.

    `clm`: plain language modeling on every token.
    `random`: the number of tokens that `guided` keeps, chosen at random.
    `student`: the same number of tokens, those with the highest student loss.
    `uld`: every token, plus the distance between the sorted probabilities of both models. It works with any vocabulary.
    `kld`: every token, plus the Kullback-Leibler divergence from the teacher. Both models need the same vocabulary.

    `clm`, `random` and `student` never load the teacher.
    """
    unit: Unit = "token"
    """The stretch of text over which both models are compared: docs/method.md#beyond-the-paper. Only for `guided`.

    `token`: each student token with the teacher tokens that cover it, as in the paper.
    `chunk`: each stretch of text that both tokenizers cut alike. Its tokens have one weight.
    """
    weighting: Weighting = "top_k"
    """How a comparison becomes a weight. Only for `guided`.

    `top_k`: 1 for the `keep` of the tokens with the highest excess, 0 for the others, as in the paper.
    `threshold`: 1 unless the student is better than the teacher by `threshold` nats or more.
    `control_variate`: 1 - `strength` * min(r, `clip`), where r is the student's probability divided by the teacher's.
    """
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """Nats, for `weighting = "threshold"`, and for the curve `guidance/share_below` of every guided run."""
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25
    """Factor of the likelihood ratio, for `weighting = "control_variate"`."""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """Upper bound of the likelihood ratio, for `weighting = "control_variate"`, where `strength` * `clip` is at most 1.

    Also for the curve `guidance/likelihood_ratio` of every guided run.
    """
    aggregate: Aggregate = "max"
    """How the losses of the teacher tokens that cover a student token become one number. Only for `unit = "token"`."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the mapped tokens that is kept, for `weighting = "top_k"`. At most 6 decimals."""
    scope: Scope = "microbatch"
    """The group of tokens that is ranked together, for `weighting = "top_k"`.

    `sequence`: a row.
    `microbatch`: the micro-batch of one data-parallel rank.
    `global`: all tokens of the step, over all ranks.
    """
    unmapped: Unmapped = "include"
    """Whether unmapped tokens, for example EOS, are trained on: docs/method.md#unmapped-tokens-by-reason."""
    require_positive: bool = False
    """Keep only tokens on which the student's loss is higher than the teacher's."""
    combine: Literal["min", "mean"] = "min"
    """How the losses of several teachers become one number."""
    equal_parts: PositiveInt | None = None
    """A coarser alignment to compare with: docs/method.md#baselines. Only for `guided`.

    Both sides of a row are cut into this many equal parts, and each token is covered by its complete part.
    """
    distance_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor of the distance that `uld` and `kld` add to the loss. The authors of ULD used 1.5.

    See docs/method.md#distances-between-distributions.
    """

    @property
    def selects(self) -> bool:
        """Whether the objective gives weights to tokens."""
        return self.objective in ("guided", "random", "student")

    @property
    def ranks(self) -> bool:
        """Whether the weights follow from a ranking of the tokens."""
        return self.selects and self.weighting == "top_k"

    @property
    def distance(self) -> Literal["uld", "kld"] | None:
        """The distance from the teacher's distribution that is added to the loss, or None."""
        return self.objective if self.objective in ("uld", "kld") else None

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads a teacher."""
        return self.objective == "guided" or self.distance is not None

    def notes(self) -> Iterator[str]:
        """One note for the fields that were given although the objective ignores them."""
        given = self.model_fields_set
        idle = [name for name in _OF_GUIDES if self.objective != "guided"] + [name for name in _OF_SELECTION if not self.selects]
        why = "selects tokens without a teacher" if self.selects else "trains on every token"
        yield from _no_effect(given.intersection(idle), f"guidance.objective = {self.objective!r} {why}")
        if self.objective == "guided":
            unused = {name for weighting, names in _OF_WEIGHTING.items() if weighting != self.weighting for name in names}
            yield from _no_effect(given & unused, f"guidance.weighting is {self.weighting!r}")
            if self.unit == "chunk":
                yield from _no_effect(given & {"aggregate"}, "guidance.unit is 'chunk'")

    @model_validator(mode="after")
    def _of_this_objective(self) -> Self:
        if self.equal_parts is not None and self.objective != "guided":
            raise ValueError(f"equal_parts applies only to objective 'guided' (objective is {self.objective!r})")
        if self.distance_weight != 1 and self.distance is None:
            raise ValueError(f"distance_weight applies only to objectives 'uld' and 'kld' (objective is {self.objective!r})")
        if self.objective != "guided" and (self.unit, self.weighting) != ("token", "top_k"):
            name, value = ("unit", self.unit) if self.unit != "token" else ("weighting", self.weighting)
            raise ValueError(f"{name} = {value!r} applies only to objective 'guided' (objective is {self.objective!r})")
        if self.require_positive and self.weighting != "top_k":
            raise ValueError(
                f"require_positive applies only to weighting 'top_k' (weighting is {self.weighting!r}): "
                "weighting 'threshold' with threshold = 0 keeps every token with an excess above 0"
            )
        if self.equal_parts is not None and self.unit == "chunk":
            raise ValueError("equal_parts replaces the alignment, and unit 'chunk' needs it")
        if self.weighting == "control_variate" and self.strength * self.clip > 1 + 1e-9:
            raise ValueError(
                f"strength * clip is {self.strength} * {self.clip} = {self.strength * self.clip:g}: at most 1 is allowed, "
                "because the smallest weight is 1 - strength * clip"
            )
        return self

    @field_validator("keep")
    @classmethod
    def _decimals(cls, keep: float) -> float:
        if round(keep, 6) != keep:
            raise ValueError("at most 6 decimals are allowed, because the number of kept tokens is computed exactly")
        return keep


_OF_GUIDES = ("aggregate", "require_positive", "combine", "threshold", "strength", "clip")
_OF_SELECTION = ("keep", "scope", "unmapped")
_OF_WEIGHTING = {"top_k": ("keep", "scope"), "control_variate": ("strength",)}
"""`threshold` and `clip` are also those of two curves of every guided run."""


def _no_effect(names: set[str], why: str) -> Iterator[str]:
    if names:
        fields = ", ".join(f"guidance.{name}" for name in sorted(names))
        yield f"note: {fields} {'has' if len(names) == 1 else 'have'} no effect: {why}."


class Parallel(Section):
    """How the student is distributed over the ranks. See docs/training.md#layouts."""

    pipeline_stages: Annotated[int, Field(ge=0)] = 0
    """Number of pipeline stages. 0 disables the pipeline and allows any ZeRO stage; 1 or more requires ZeRO-1."""
    partition: Literal["parameters", "uniform"] | tuple[PositiveInt, ...] = "parameters"
    """How layers are assigned to pipeline stages.

    `parameters`: about equally many parameters per stage.
    `uniform`: about equally many layers per stage.
    A list: this many decoder layers per stage, for example `[5, 6, 6, 5]`.
    """
    activation_checkpointing: bool = False
    """Store only the input of each decoder layer, and recompute its activations in the backward pass."""
    sequence: PositiveInt = 1
    """Number of ranks that share each row, each with an equal part of its positions: docs/training.md#long-rows.

    It divides `data.row_length` and the attention heads. Not with a pipeline, document attention, `uld` or `kld`.
    """


class Schedule(Section):
    """The learning rate over the run, relative to the peak in the DeepSpeed configuration."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up: docs/training.md#learning-rate.

    `cosine`, `linear`: a decay over all further steps.
    `constant`: the peak.
    `wsd`: warm-up, stable, decay. The peak, and a decay over the last steps.
    """
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up to the peak."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step, divided by the peak. `constant` ignores it."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the decay of `wsd`. `1-sqrt` falls by the square root of the share of the decay that is done."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run's steps in which `wsd` decays, rounded up to complete steps."""
    decay_steps: PositiveInt | None = None
    """Number of steps in which `wsd` decays, instead of `decay_fraction`."""
    decay_from: Path | None = None
    """A checkpoint of another run from which this run starts, only to decay: docs/training.md#a-run-that-only-decays.

    `decay_steps` must be the number of steps after the checkpoint.
    """

    @model_validator(mode="after")
    def _of_wsd(self) -> Self:
        given = [name for name in ("decay_shape", "decay_fraction", "decay_steps", "decay_from") if name in self.model_fields_set]
        given = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.kind != "wsd":
            raise ValueError(f"{given[0]} applies only to kind 'wsd' (kind is {self.kind!r})")
        if self.decay_steps is not None and "decay_fraction" in given:
            raise ValueError("give only one of 'decay_steps' and 'decay_fraction'")
        if self.decay_from is not None and self.decay_steps is None:
            raise ValueError("decay_from needs decay_steps, the number of steps after the checkpoint")
        return self

    def decay(self, steps: int) -> int:
        """Number of steps in which a run of `steps` steps decays, for `wsd`."""
        return self.decay_steps or math.ceil(round(self.decay_fraction * steps, 6))

    def notes(self, steps: int) -> Iterator[str]:
        """Notes if the warm-up is longer than a run of `steps` steps, or leaves no room for the decay."""
        if self.kind == "wsd" and self.decay_from is None and self.warmup_steps + self.decay(steps) > steps >= self.warmup_steps:
            yield (
                f"note: training.schedule has {self.warmup_steps:,} steps of warm-up and {self.decay(steps):,} of decay, the run "
                f"has {steps:,}: the decay begins below the peak."
            )
        if self.warmup_steps > steps:
            yield (
                f"note: training.schedule.warmup_steps is {self.warmup_steps:,}, the run has {steps:,} step{'s' * (steps != 1)}: "
                "the learning rate never reaches its peak."
            )


class Training(Section):
    """Length of the run, seed, and reasons to stop early."""

    steps: PositiveInt | None = None
    """Optimizer steps. Give exactly one of `training.steps` and `training.tokens`."""
    tokens: PositiveInt | None = None
    """Student tokens to train on, rounded up to complete steps."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for the initial weights, the order of documents and the order of rows."""
    schedule: Schedule = Schedule()
    max_nonfinite_steps: PositiveInt = 5
    """The run stops after this many consecutive steps with a loss or gradient that is not finite."""
    outlier_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Skip a step whose loss or gradient norm is more than this many standard deviations from the mean of the last steps.

    For example 6. If it is missing, no step is skipped: docs/training.md#outliers.
    """
    outlier_window: Annotated[int, Field(ge=20)] = 128
    """Number of the last steps whose mean and standard deviation `outlier_sigma` uses."""
    max_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """After this many minutes of wall time, start-up included, the run saves and exits, as on SIGTERM and SIGUSR1."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'steps' and 'tokens'")
        return self


class Eval(Section):
    """Evaluation: bits per byte on `data.valid`, before the first step and after the last."""

    every: PositiveInt | None = None
    """Steps between further evaluations."""
    rows: PositiveInt | None = None
    """Number of rows to evaluate, from the start of `data.valid`. If it is missing, all rows are evaluated."""


class Checkpoint(Section):
    """When checkpoints are written and removed."""

    every: PositiveInt | None = None
    """Steps between checkpoints. One is always written after the last step."""
    keep_last: PositiveInt = 2
    """Number of the newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this number are never removed."""


class Logging(Section):
    """Output of the run. See docs/monitoring.md."""

    every: PositiveInt = 1
    """Steps between lines on the console. TensorBoard and `metrics.jsonl` get every step."""
    samples: PositiveInt | None = None
    """Number of rows of `data.valid` that every evaluation writes token by token: docs/monitoring.md#seeing-what-is-learned."""


class Run(Section):
    """The complete configuration of a run."""

    output: Path
    """Folder for checkpoints, `metrics.jsonl` and TensorBoard files."""
    data: Data
    student: Student
    teacher: tuple[Teacher, ...] = ()
    """One table `[teacher]`, or one table `[[teacher]]` per teacher. Several teachers must all be `cached`."""
    guidance: Guidance = Guidance()
    parallel: Parallel = Parallel()
    training: Training
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    _notes: tuple[str, ...] = PrivateAttr(())

    def model_post_init(self, context: Any, /) -> None:
        """Keep the notes that `load_run` passes as the context of the validation."""
        self._notes = tuple(context or ())

    @property
    def cached_teachers(self) -> tuple[Teacher, ...]:
        """The teachers whose losses are stored with the datasets. Empty if a teacher is loaded, or if none is needed."""
        return self.teacher if self.guidance.needs_teacher and self.teacher[0].placement == "cached" else ()

    @property
    def cached(self) -> bool:
        """Whether the run reads the losses of its teachers from the datasets."""
        return bool(self.cached_teachers)

    @property
    def loaded_teacher(self) -> Teacher | None:
        """The teacher that the processes load. None if its losses are cached, or if the objective needs no teacher."""
        return self.teacher[0] if self.guidance.needs_teacher and not self.cached else None

    @property
    def weights(self) -> dict[str, Path]:
        """The models whose weights the run reads, by the field that names them: `student.pretrained`, `teacher.path`."""
        paths = {
            "student.pretrained": self.student.pretrained,
            "teacher.path": self.loaded_teacher.path if self.loaded_teacher else None,
        }
        return {field: path for field, path in paths.items() if path is not None}

    def notes(self) -> Iterator[str]:
        """Notes about how the run was given: fields under an old name, and fields that the objective ignores."""
        yield from self._notes
        yield from self.guidance.notes()

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_teacher(cls, teacher: Any) -> Any:
        return [teacher] if isinstance(teacher, Mapping) else teacher

    @model_validator(mode="after")
    def _teacher_for_guidance(self) -> Self:
        objective = self.guidance.objective
        if self.guidance.needs_teacher and not self.teacher:
            raise ValueError(f"guidance.objective = {objective!r} needs a [teacher]; without one, use 'clm'")
        if self.guidance.distance:
            self._check_distance()
        if self.parallel.sequence > 1:
            self._check_sequence()
        for i, teacher in enumerate(self.teacher):
            if teacher.path is None and teacher.placement != "cached":
                raise ValueError(f"teacher.path is missing: it is required with placement {teacher.placement!r}")
            if len(self.teacher) > 1 and teacher.placement != "cached":
                raise ValueError(
                    f"[[teacher]] {i + 1} of {len(self.teacher)} has placement {teacher.placement!r}: several teachers must all "
                    f"be 'cached' ({tool('preprocess.score_teacher')})"
                )
            if not i and teacher.data:
                raise ValueError("teacher.data is only for the second and each further teacher: the first one reads data.train")
            if i and len(teacher.data) != len(self.data.train):
                raise ValueError(
                    f"[[teacher]] {i + 1} of {len(self.teacher)} has {len(teacher.data)} datasets in 'data', data.train has "
                    f"{len(self.data.train)}: align each dataset of data.train for this teacher too"
                )
        if self.eval.every is not None and self.data.valid is None:
            raise ValueError("eval.every needs data.valid, which is missing")
        if self.logging.samples is not None and self.data.valid is None:
            raise ValueError("logging.samples needs data.valid, which is missing")
        return self

    def _check_sequence(self) -> None:
        """Settings with which the ranks of a row would not compute what one rank computes."""
        ranks, row_length = self.parallel.sequence, self.data.row_length
        if row_length % ranks:
            raise ValueError(
                f"data.row_length = {row_length:,} cannot be divided among {ranks} ranks (parallel.sequence): use a multiple, "
                f"for example {-(-row_length // ranks) * ranks:,}"
            )
        stages, attention = self.parallel.pipeline_stages, self.student.attention
        excluded = (
            (stages > 0, "parallel.pipeline_stages", stages, "a pipeline sends whole rows from stage to stage"),
            (self.data.by_document, "data.attention", "document", "each row is attended as a whole, without a mask"),
            (attention == "flash_attention_2", "student.attention", attention, "the ranks of a row compute attention with sdpa"),
            (self.guidance.distance, "guidance.objective", self.guidance.objective, "distributions are compared for whole rows"),
        )
        for given, field, value, why in excluded:
            if given:
                raise ValueError(f"parallel.sequence = {ranks} does not run with {field} = {value!r}: {why}")

    def _check_distance(self) -> None:
        """`uld` and `kld` compare the distributions of both models in one process. No file and no other stage has them."""
        objective, teacher = self.guidance.objective, self.teacher[0]
        if len(self.teacher) > 1 or teacher.placement != "replicated":
            raise ValueError(
                f"guidance.objective = {objective!r} needs one teacher with placement 'replicated': it compares distributions"
            )
        if self.parallel.pipeline_stages:
            raise ValueError(
                f"guidance.objective = {objective!r} does not run in a pipeline: set parallel.pipeline_stages to 0, "
                f"not {self.parallel.pipeline_stages}"
            )
