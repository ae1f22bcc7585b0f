"""Compute a teacher's losses for a dataset: its shards on an engine, then dataset.json.

    score     scores the shards that are not scored, or one slice of them, and records the losses if all shards are scored
    finish    only records the losses

A shard is scored if its files exist (`corpus.losses`). Any number of processes may therefore score one dataset without
communicating, each with a separate slice, and an interrupted scoring resumes with the shards that are left.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from megatron_vocagno import hub
from megatron_vocagno.config import Bos
from megatron_vocagno.corpus.dataset import AlignedDataset, local_folder
from megatron_vocagno.corpus.front import front_of
from megatron_vocagno.corpus.losses import gather, record_losses, remove_leftover_losses, unscored
from megatron_vocagno.corpus.manifest import BUILD, SERVED, Manifest, Scoring, read_manifest, to_json, write_durably
from megatron_vocagno.errors import ChangedError, CorpusError, ModelError, ServerError, ServerLostError
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.folder import described_folder, text_sizes
from megatron_vocagno.preprocess.build_folder import locked
from megatron_vocagno.preprocess.jobs import JobRunner, require_all, run_jobs
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.reuse import open_scored
from megatron_vocagno.preprocess.score_served import ServedShard, ask_servers, canary_prompt, served_fingerprint
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreResult, difference, score_shard
from megatron_vocagno.preprocess.workers import JobFailure, in_this_process
from megatron_vocagno.serving.client import Servers
from megatron_vocagno.serving.engines import UNKNOWN

if TYPE_CHECKING:
    from megatron_vocagno.model.quantized import Quantization
    from megatron_vocagno.preprocess.score_check import Difference

log = logging.getLogger(__name__)
CONTEXT = 4096
"""Tokens of the longest window, if the teacher reads at least this many."""

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class ScoringOptions:
    """The options of a scoring.

    teacher          a folder, a GGUF file, or a pinned Hub id
    context, stride  None: the smaller of `CONTEXT` and the teacher's longest input, and half of it
    bos              as `teacher.bos` of a run file
    servers          where the teacher is served. None: it runs in this process
    dtype            None: bfloat16, or the type that the server reports
    check            first compare this number of windows of a served teacher with the teacher in this process
    """

    teacher: Path
    dtype: DType | None = None
    quantization: Quantization = "none"
    context: int | None = None
    stride: int | None = None
    tokens_per_batch: int = 16_384
    bos: Bos = "auto"
    servers: Servers | None = None
    check: int = 0

    def scoring(self, data: AlignedDataset) -> Scoring:
        """The record of the scoring of a dataset. If there are servers, it waits for their answers.

        Raises CorpusError, ModelError, DatasetError or ServerError if the teacher, `context` or `stride` does not fit.
        """
        if self.teacher.suffix != ".gguf":
            return self._scoring(data)
        from megatron_vocagno.model.gguf import naming_file

        with naming_file(self.teacher):
            return self._scoring(data)

    def _scoring(self, data: AlignedDataset) -> Scoring:
        if self.servers is None or self.teacher.suffix == ".gguf":
            # only here: it imports torch, which scoring by a server does not need
            from megatron_vocagno.model.teacher import teacher_folder

            folder, has_weights = teacher_folder(self.teacher), True
        else:
            folder, has_weights = described_folder(self.teacher)
        rows, longest = text_sizes(folder)
        tokens = data.teacher_tokenizer.rows
        if rows < tokens:
            raise CorpusError(
                f"{data.path}: its teacher tokenizer has {tokens:,} tokens, the teacher {self.teacher} has {rows:,}: "
                "the dataset was aligned for another teacher"
            )
        if note := data.require_tokenizer("teacher", folder):
            log.warning("note: %s", note)
        front = front_of(self.bos, [folder, data.teacher_tokenizer.path], "--bos", rows)
        # a server reads the token before a window too, and always makes one more
        around = len(front) + (0 if self.servers is None else 2)
        context = self.context or min(CONTEXT, (longest or CONTEXT) - around)
        stride = self.stride or max(1, context // 2)
        if longest is not None and context + around > longest:
            in_front = f", {around} of them in front of the text{' and for the server' if self.servers else ''}" if around else ""
            raise CorpusError(f"--context {context:,}: the teacher {self.teacher} reads {longest:,} tokens{in_front}")
        if stride > context:
            raise CorpusError(f"--stride {stride:,} is more than --context {context:,}: tokens between windows would be skipped")
        before = front[-1] if front else data.teacher_tokenizer.eos_id
        scoring = Scoring(
            teacher=teacher_fingerprint(self.teacher) if has_weights else SERVED,
            name=hub.short_name(self.teacher),
            dtype=self.dtype or "bfloat16",
            weights="as-is" if self.quantization == "none" else self.quantization,
            context=context,
            stride=stride,
            before=before,
            front=front,
        )
        return scoring if self.servers is None else self._by_server(scoring, self.servers, data, folder, rows)

    def _by_server(self, scoring: Scoring, servers: Servers, data: AlignedDataset, folder: Path, vocabulary: int) -> Scoring:
        """The record of a scoring by servers, with their settings and a canary."""
        needed = len(scoring.front) + scoring.context + 2
        served, dtype, known = ask_servers(servers, self.canary(scoring, data), needed, vocabulary, self.teacher, folder)
        if self.dtype is not None and dtype not in (self.dtype, UNKNOWN):
            raise ServerError(f"{servers.urls[0]} computes in {dtype}, and --dtype is {self.dtype}")
        fingerprint = scoring.teacher
        if fingerprint != SERVED and not known and not self.check:
            log.warning(
                "note: the place of the weights at %s cannot be compared with --teacher %s. The losses are recorded as those of "
                "a served teacher, which never count as those of %s. To record them as those, give --check 8",
                servers.urls[0],
                self.teacher,
                scoring.name,
            )
            fingerprint = SERVED
        if fingerprint == SERVED:
            fingerprint = served_fingerprint(folder / "config.json", served.model)
        return scoring.model_copy(update={"teacher": fingerprint, "dtype": self.dtype or dtype, "served": served})

    @staticmethod
    def canary(scoring: Scoring, data: AlignedDataset) -> tuple[int, ...]:
        """The ids of the canary's prompt."""
        return canary_prompt(data.teacher_tokenizer.path, scoring.front or (scoring.before,))


def score(
    path: Path,
    options: ScoringOptions | None,
    engine: JobRunner[ScoreResult, ScoreJob] = in_this_process,
    part: Slice | None = None,
    replace: bool = False,
    reuse: Path | None = None,
    on_plan: Callable[[Sequence[ScoreJob]], object] = lambda jobs: None,
    on_check: Callable[[Difference], object] = lambda difference: None,
    on_shard: Callable[[ScoreResult | JobFailure[ScoreJob]], object] = lambda result: None,
) -> Manifest:
    """Score a dataset. Returns its manifest, which contains the losses if all shards are scored.

    options   None: all losses are taken from `reuse`, and the settings are those of its scoring
    engine    runs `score_shard` over jobs: `run_local` or `run_ray`, with the other arguments bound
    part      score only this slice of the shards
    replace   score shards again that were scored with other settings
    reuse     a dataset that was scored with the same settings. Losses of the same teacher tokens are taken from it
    on_plan   called with the jobs
    on_check  called with the result of the comparison
    on_shard  called with each result or failure

    Raises CorpusError, ModelError, ServerError or OSError. Scored shards are kept, and the next call continues with the others.
    """
    root = local_folder(path)
    manifest = read_manifest(root)
    recorded = manifest.teacher_losses
    # opened without its losses: a damaged or missing file of losses is made again
    data = AlignedDataset.of(root, manifest.model_copy(update={"teacher_losses": None}))
    scoring, served = _prepare(data, options, reuse)
    if recorded is not None and recorded.scoring != scoring and not replace:
        raise ChangedError(f"{path} was scored with other settings:\n{difference(recorded.scoring, scoring)}")
    if scoring.served is not None:
        scoring = _first_record(scoring, root / BUILD / "served.json")
    with locked(root, part):
        if recorded is not None and (recorded.scoring != scoring or recorded != gather(root, manifest.shards)):
            manifest = record_losses(root, manifest, None)  # they are about to change
        counts = [shard.totals.documents for shard in manifest.shards]
        firsts = [stop - count for stop, count in zip(itertools.accumulate(counts), counts, strict=True)]
        jobs = [
            ScoreJob(
                i,
                root / shard.path,
                shard,
                scoring,
                options.teacher if options else None,
                options.tokens_per_batch if options else 0,
                replace,
                served,
                reuse,
                first,
            )
            for i, (shard, first) in enumerate(zip(manifest.shards, firsts, strict=True))
            if shard.totals.documents
        ]
        selected = part.of(jobs) if part else jobs
        if options is not None and options.check and jobs:
            from megatron_vocagno.preprocess.score_check import check_server

            on_check(check_server(data, jobs[0], options.check))
        on_plan(selected)
        run_jobs(engine, score_shard, selected, (ChangedError, ModelError, OSError, ServerLostError), on_shard, "scored")
        return _record_if_complete(root, manifest)


def _prepare(data: AlignedDataset, options: ScoringOptions | None, reuse: Path | None) -> tuple[Scoring, ServedShard | None]:
    """The settings of a scoring, and what its shards need of a served teacher."""
    open_scored.cache_clear()  # an earlier call may have read other losses
    scored = None if reuse is None else open_scored(reuse)
    if scored is not None:
        scored.require_same_tokenizer(data)
    if options is None:
        assert scored is not None, "either a teacher or a scored dataset is needed"
        return scored.scoring, None
    scoring = options.scoring(data)
    if scored is not None:
        if scored.scoring != scoring:
            settings = difference(scored.scoring, scoring, "there", "here").rpartition("\n")[0]
            raise ChangedError(f"--reuse {reuse} was scored with other settings:\n{settings}\n  Use the same options as there.")
        scoring = scored.scoring
    if options.servers is None:
        return scoring, None
    return scoring, ServedShard(options.servers, options.canary(scoring, data))


def _first_record(scoring: Scoring, file: Path) -> Scoring:
    """The equal record of the first process that scored by these servers, so that all shards have one canary to the last digit.

    If there is none, or another one, this becomes the record.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("xb") as stream:
            stream.write(to_json(scoring))
            return scoring
    except FileExistsError:
        pass
    try:
        found = Scoring.model_validate_json(file.read_bytes())
    except ValidationError:  # another process is writing it, or has been killed
        found = None
    if found == scoring:
        return found
    write_durably(file, to_json(scoring))
    return scoring


def finish(path: Path) -> Manifest:
    """Record the losses of a dataset. Raises CorpusError if not all of its shards are scored, or not with the same settings."""
    data = AlignedDataset.open(path)
    manifest = _record_if_complete(data.path, data.manifest)
    if manifest.teacher_losses is None:
        require_all(unscored(data.path, manifest), len(manifest.shards), "not scored", path)
        raise CorpusError(f"{path}: its shards were scored with different settings; score it with --replace")
    return manifest


def _record_if_complete(path: Path, manifest: Manifest) -> Manifest:
    losses = gather(path, manifest.shards)
    if losses is None:
        return manifest
    sealed = record_losses(path, manifest, losses)
    remove_leftover_losses(path, manifest)
    return sealed
