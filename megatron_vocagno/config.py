"""A run: frozen models, one for each part of its file (`run_file.py` reads them).

It owns what is to be learned from what; the DeepSpeed configuration (`ds_configs/*.json`) owns batch sizes, precision, the
optimizer with its peak learning rate, gradient clipping and the ZeRO stage: none of them is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_vocagno.errors import tool

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]
Attention = Literal["auto", "sdpa", "flash_attention_2"]
Bos = Literal["auto", "none"] | Annotated[int, Field(ge=0)]
Objective = Literal["guided", "clm", "random", "student", "uld", "kld"]
PositiveInt = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """One section of the file. Frozen, and it knows every key that may stand in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Part):
    """A dataset of a blend."""

    path: Path
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the rows is its weight over the sum of all weights."""


class Data(Part):
    """Aligned datasets, made by `tools.preprocess.build_dataset`."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """A path, or for a blend several tables `[[data.train]]`."""
    valid: Path | None = None
    row_length: Annotated[int, Field(ge=32)] = 2048
    """Student positions of a row (S)."""
    attention: Literal["row", "document"] = "row"
    """What a token sees, in both models: all of its row before it, or its own document's part of that."""

    @property
    def by_document(self) -> bool:
        """Whether attention ends at the borders of documents."""
        return self.attention == "document"

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, train: Any) -> Any:
        return [{"path": train}] if isinstance(train, str | Path) else train


class Student(Part):
    """The model that learns: pretrained weights, or a configuration to start from."""

    pretrained: Path | None = None
    """A Hugging Face folder with safetensors."""
    config: dict[str, Any] | None = None
    """Fields of a Hugging Face configuration, `model_type` first; `vocab_size` comes from the data when it is not given."""
    bos: Bos = "auto"
    """What it reads at the head of each row: `auto` is what its own tokenizer puts in front of a text, `none` nothing, a number
    that id.
    """
    attention: Attention = "auto"

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("give exactly one of 'pretrained' (continue from weights) and 'config' (start from nothing)")
        return self


class Teacher(Part):
    """The frozen model that guides."""

    path: Path | None = None
    """A Hugging Face folder with safetensors, or a GGUF file (dequantised once, kept in a cache folder)."""
    data: tuple[Path, ...] = ()
    """For the second and every further teacher: the datasets of `data.train`, in their order, aligned for this teacher."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    weights: Literal["as-is", "int8", "fp8"] = "as-is"
    """`int8`, `fp8`: the decoder's matrices are quantised when they are loaded, by torchao."""
    placement: Literal["replicated", "zero3", "cached"] = "replicated"
    """Where its losses come from.

    `replicated`: every rank holds the teacher, and the ranks of a pipeline group share a step's rows.
    `zero3`: its weights are sharded over all ranks, and gathered layer by layer.
    `cached`: `tools.preprocess.score_teacher` has written them beside the data; no teacher is loaded.
    """
    bos: Bos = "auto"
    """What it reads at the head of each row or window, as `student.bos`."""
    tokens_per_batch: PositiveInt = 16384
    """Padded teacher tokens of one forward. A memory bound, it changes no result beyond rounding."""
    attention: Attention = "auto"


class Guidance(Part):
    """The method: which of the student's losses count. See docs/method.md."""

    objective: Objective = "guided"
    """`guided` is the method; the others are what it is compared with (docs/method.md#baselines).

    `clm`: plain language modeling, every token.
    `random`: as many tokens as `guided` keeps, by chance.
    `student`: as many, those of highest loss of the student alone.
    `uld`, `kld`: every token, and besides its loss the distance from the teacher's distribution: of sorted probabilities,
    for any vocabulary, or the Kullback-Leibler divergence, for one vocabulary.
    """
    aggregate: Aggregate = "max"
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the mapped tokens that is kept."""
    scope: Scope = "microbatch"
    unmapped: Unmapped = "include"
    require_positive: bool = False
    """Keep only tokens where the student is worse than the teacher."""
    combine: Literal["min", "mean"] = "min"
    """Of the guides of several teachers."""
    chunks: PositiveInt | None = None
    """A worse alignment, for comparison: both sides of a row are cut into so many equal chunks, and each token is covered by its
    whole chunk.
    """
    distance_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What the distance of `uld` and `kld` counts beside the loss."""

    @property
    def selects(self) -> bool:
        """Whether some tokens are learned and others are not."""
        return self.objective in ("guided", "random", "student")

    @property
    def distance(self) -> Literal["uld", "kld"] | None:
        """What is learned besides the loss, from the teacher's distributions."""
        return self.objective if self.objective in ("uld", "kld") else None

    @property
    def needs_teacher(self) -> bool:
        return self.objective == "guided" or self.distance is not None

    def notes(self) -> Iterator[str]:
        """What a user may not have meant: fields that stand in the run and that its objective does not read."""
        idle = [name for name in _OF_GUIDES if self.objective != "guided"] + [name for name in _OF_SELECTION if not self.selects]
        if given := [f"guidance.{name}" for name in idle if name in self.model_fields_set]:
            why = "selects without a guide" if self.selects else "learns every token"
            have = "has" if len(given) == 1 else "have"
            yield f"note: {', '.join(given)} {have} no effect: guidance.objective = {self.objective!r} {why}."

    @model_validator(mode="after")
    def _of_this_objective(self) -> Self:
        if self.chunks is not None and self.objective != "guided":
            raise ValueError(f"chunks replaces the alignment of 'guided'; objective is {self.objective!r}")
        if self.distance_weight != 1 and self.distance is None:
            raise ValueError(f"distance_weight is of 'uld' and 'kld'; objective is {self.objective!r}")
        return self

    @field_validator("keep")
    @classmethod
    def _decimals(cls, keep: float) -> float:
        if round(keep, 6) != keep:
            raise ValueError("at most 6 decimals: the number of kept tokens is computed exactly from them")
        return keep


_OF_GUIDES = ("aggregate", "require_positive", "combine")
_OF_SELECTION = ("keep", "scope", "unmapped")


class Parallel(Part):
    pipeline_stages: Annotated[int, Field(ge=0)] = 0
    """0: no pipeline, the plain engine with any ZeRO stage; 1 and more: the pipeline engine, with ZeRO-1."""
    partition: Literal["parameters", "uniform"] | tuple[PositiveInt, ...] = "parameters"
    """How layers are dealt to stages: equal parameters, equal layers, or so many decoder layers each."""
    activation_checkpointing: bool = False
    """Keep only the input of each decoder layer, and compute the rest again in the backward pass."""


class Schedule(Part):
    """Learning rate over the run, as a share of the peak that the DeepSpeed configuration names."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak at the last step."""

    def notes(self, steps: int) -> Iterator[str]:
        """What a user may not have meant, of a run of so many steps."""
        if self.warmup_steps > steps:
            yield (
                f"note: training.schedule.warmup_steps is {self.warmup_steps:,}, the run has {steps:,} step{'s' * (steps != 1)}: "
                "the learning rate never reaches its peak."
            )


class Training(Part):
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    """Student tokens to learn from, rounded up to whole steps."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides initial weights, order of documents and order of rows."""
    schedule: Schedule = Schedule()
    max_nonfinite_steps: PositiveInt = 5
    """So many steps in a row with a loss or gradient that is not finite stop the run."""
    max_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """After so many minutes of wall time the run saves a checkpoint and leaves, as it does on SIGTERM and SIGUSR1."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'steps' and 'tokens'")
        return self


class Eval(Part):
    """Bits per byte on `data.valid`, before the first step, every so many steps, and after the last."""

    every: PositiveInt | None = None
    rows: PositiveInt | None = None
    """The first so many rows; all of them when it is not given."""


class Checkpoint(Part):
    every: PositiveInt | None = None
    """Steps between checkpoints; one is always written after the last step."""
    keep: PositiveInt = 2
    """The newest so many stay on disk."""
    keep_every: PositiveInt | None = None
    """Besides them, those whose step is a multiple of this stay for good."""


class Logging(Part):
    every: PositiveInt = 1
    """Steps between lines on the console; TensorBoard and metrics.jsonl get every step."""
    samples: PositiveInt | None = None
    """So many rows of `data.valid` are written down at every evaluation, token by token: both losses, and what would be kept."""


class Run(Part):
    """The whole run."""

    output: Path
    """Checkpoints, metrics.jsonl and TensorBoard files go here."""
    data: Data
    student: Student
    teacher: tuple[Teacher, ...] = ()
    """A table `[teacher]`, or for several teachers tables `[[teacher]]`, all of them cached."""
    guidance: Guidance = Guidance()
    parallel: Parallel = Parallel()
    training: Training
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_teacher(cls, teacher: Any) -> Any:
        return [teacher] if isinstance(teacher, Mapping) else teacher

    @model_validator(mode="after")
    def _teacher_for_guidance(self) -> Self:
        objective = self.guidance.objective
        if self.guidance.needs_teacher and not self.teacher:
            raise ValueError(f"guidance.objective = {objective!r} needs a [teacher]; 'clm' is the objective without one")
        if self.guidance.distance:
            self._check_distance()
        for i, teacher in enumerate(self.teacher):
            if teacher.path is None and teacher.placement != "cached":
                raise ValueError(f"teacher.path is missing: a {teacher.placement} teacher is read from there")
            if len(self.teacher) > 1 and teacher.placement != "cached":
                raise ValueError(
                    f"[[teacher]] {i + 1} of {len(self.teacher)} has placement {teacher.placement!r}: several teachers must all "
                    f"be 'cached' ({tool('preprocess.score_teacher')})"
                )
            if not i and teacher.data:
                raise ValueError("teacher.data is for the second and every further teacher: the first one reads data.train")
            if i and len(teacher.data) != len(self.data.train):
                raise ValueError(
                    f"[[teacher]] {i + 1} of {len(self.teacher)} names {len(teacher.data)} datasets in 'data', and data.train "
                    f"{len(self.data.train)}: each further teacher needs every one of them, aligned for it"
                )
        if self.eval.every is not None and self.data.valid is None:
            raise ValueError("eval.every is given, but there is no data.valid to evaluate on")
        if self.logging.samples is not None and self.data.valid is None:
            raise ValueError("logging.samples is given, but there is no data.valid to take rows from")
        return self

    def _check_distance(self) -> None:
        """The baselines need the teacher's distribution beside the student's, which no file and no other stage has."""
        objective, teacher = self.guidance.objective, self.teacher[0]
        if len(self.teacher) > 1 or teacher.placement != "replicated":
            raise ValueError(
                f"guidance.objective = {objective!r} needs one teacher of placement 'replicated': it compares distributions"
            )
        if self.parallel.pipeline_stages:
            raise ValueError(
                f"guidance.objective = {objective!r} runs in the engine without a pipeline: parallel.pipeline_stages = 0, "
                f"not {self.parallel.pipeline_stages}"
            )
