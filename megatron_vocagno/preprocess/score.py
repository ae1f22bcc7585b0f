"""A dataset, scored: its shards on an engine, then dataset.json.

    score     scores the shards that are not scored, all of them or the i-th n-th; whoever finds all of them done records it
    finish    the record alone

A shard is scored when its files are there (`corpus.losses`); so any number of processes may share a dataset without talking to
each other, each with a slice of its own, and what was interrupted goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vocagno import hub
from megatron_vocagno.config import Bos
from megatron_vocagno.corpus.dataset import AlignedDataset, local_folder
from megatron_vocagno.corpus.front import front_of
from megatron_vocagno.corpus.losses import gather, record_losses, tidy, unscored
from megatron_vocagno.corpus.manifest import Manifest, Scoring, read_manifest
from megatron_vocagno.errors import ChangedError, CorpusError, ModelError
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.folder import read_config
from megatron_vocagno.model.quantised import Quantization
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.preprocess.build import locked
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreResult, difference, score_shard
from megatron_vocagno.preprocess.workers import Failure, failures_of, in_this_process

log = logging.getLogger(__name__)
CONTEXT = 4096
"""Tokens of the longest window, where the teacher reads so many."""

DType = Literal["bfloat16", "float16", "float32"]
JobRunner = Callable[..., Iterator[ScoreResult | Failure[ScoreJob]]]


@dataclass(frozen=True)
class ScoringOptions:
    """What a user asks for.

    teacher          a folder, a GGUF file, or a pinned Hub id
    context, stride  None for the longest window that suits, and half of it
    bos              as teacher.bos of a run file
    """

    teacher: Path
    dtype: DType = "bfloat16"
    quantization: Quantization = "none"
    context: int | None = None
    stride: int | None = None
    tokens_per_batch: int = 16_384
    bos: Bos = "auto"

    def scoring(self, data: AlignedDataset) -> Scoring:
        """Raises CorpusError, ModelError, DatasetError: the teacher does not suit the dataset, or the numbers do not."""
        folder = teacher_folder(self.teacher)
        config = read_config(folder).get_text_config()
        tokens, rows = data.teacher_tokenizer.rows, int(config.vocab_size)
        if rows < tokens:
            raise CorpusError(
                f"{data.path}: its teacher tokenizer has {tokens:,} tokens, the teacher {self.teacher} has {rows:,}: "
                "the dataset was aligned for another teacher"
            )
        if note := data.require_tokenizer("teacher", folder):
            log.warning("note: %s", note)
        front = front_of(self.bos, [folder, data.teacher_tokenizer.path], "--bos", rows)
        longest = getattr(config, "max_position_embeddings", None)
        context = self.context or min(CONTEXT, (longest or CONTEXT) - len(front))
        stride = self.stride or max(1, context // 2)
        if longest is not None and context + len(front) > longest:
            before = f", {len(front)} of them in front of the text" if front else ""
            raise CorpusError(f"--context {context:,}: the teacher {self.teacher} reads {longest:,} tokens{before}")
        if stride > context:
            raise CorpusError(f"--stride {stride:,} is more than --context {context:,}: tokens between windows would be left out")
        return Scoring(
            teacher=teacher_fingerprint(self.teacher),
            name=hub.short_name(self.teacher),
            dtype=self.dtype,
            weights="as-is" if self.quantization == "none" else self.quantization,
            context=context,
            stride=stride,
            before=front[-1] if front else data.teacher_tokenizer.eos_id,
            front=front,
        )


def score(
    path: Path,
    asked: ScoringOptions,
    engine: JobRunner = in_this_process,
    part: Slice | None = None,
    replace: bool = False,
    on_plan: Callable[[Sequence[ScoreJob]], object] = lambda jobs: None,
    on_shard: Callable[[ScoreResult | Failure[ScoreJob]], object] = lambda result: None,
) -> Manifest:
    """Scores a dataset; with `part`, some of its shards. The dataset's manifest then, with the losses where all are scored.

    engine            runs `score_shard` over jobs: `run_local` or `run_ray`, with its own arguments bound
    replace           score anew what was scored otherwise
    on_plan, on_shard: called with the jobs, and with each result or failure

    Raises CorpusError, ModelError, OSError; what is scored stays, and the next call goes on from there.
    """
    root = local_folder(path)
    manifest = read_manifest(root)
    recorded = manifest.teacher_losses
    # without them: a file that is damaged or missing is one to be made
    scoring = asked.scoring(AlignedDataset.of(root, manifest.model_copy(update={"teacher_losses": None})))
    if recorded is not None and recorded.scoring != scoring and not replace:
        raise ChangedError(f"{path} was scored otherwise:\n{difference(recorded.scoring, scoring)}")
    with locked(root, part):
        if recorded is not None and (recorded.scoring != scoring or recorded != gather(root, manifest.shards)):
            manifest = record_losses(root, manifest, None)  # they are about to change
        jobs = [
            ScoreJob(i, root / shard.path, shard, scoring, asked.teacher, asked.tokens_per_batch, replace)
            for i, shard in enumerate(manifest.shards)
            if shard.totals.documents
        ]
        mine = part.of(jobs) if part else jobs
        on_plan(mine)
        _run(mine, engine, on_shard)
        return _seal(root, manifest)


def finish(path: Path) -> Manifest:
    """Records the losses of a dataset whose shards are all scored. Raises CorpusError that names those that are not."""
    data = AlignedDataset.open(path)
    manifest = _seal(data.path, data.manifest)
    if manifest.teacher_losses is None:
        missing = unscored(data.path, manifest)
        if not missing:
            raise CorpusError(f"{path}: its shards were scored in different ways; score it with --replace")
        raise CorpusError(
            f"{path}: {len(missing):,} of {len(manifest.shards):,} shards are not scored: "
            f"{', '.join(missing[:10])}{' …' if missing[10:] else ''}; run their tasks again. Do all machines see this folder?"
        )
    return manifest


def _run(jobs: Sequence[ScoreJob], engine: JobRunner, on_shard: Callable[[ScoreResult | Failure[ScoreJob]], object]) -> None:
    if failures := failures_of(engine(score_shard, jobs, stop=(ChangedError, ModelError, OSError)), on_shard):
        shown = "\n".join(f"{failure.job.folder}: {failure.reason}" for failure in failures[:10])
        raise CorpusError(f"{len(failures):,} of {len(jobs):,} shards could not be scored; the others are, and stay\n{shown}")


def _seal(path: Path, manifest: Manifest) -> Manifest:
    losses = gather(path, manifest.shards)
    if losses is None:
        return manifest
    sealed = record_losses(path, manifest, losses)
    tidy(path, manifest)
    return sealed
