"""Input files -> a dataset: the plan, the shards on an engine, dataset.json.

    build      makes the missing shards, or one slice of them, and writes dataset.json when all are finished
    finish     writes dataset.json for finished shards; raises an error if any shard is missing

The folder `.build/` next to the shards contains the lock and the plan. The plan records sizes and times of the input files, so
that a rerun does not read finished input again. You may delete `.build/`.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_vocagno.corpus.create import create
from megatron_vocagno.corpus.identity import check_own
from megatron_vocagno.corpus.losses import gather
from megatron_vocagno.corpus.manifest import ShardRecord, Totals, hash_file
from megatron_vocagno.corpus.places import Place, place, reaching
from megatron_vocagno.errors import ChangedError, CorpusError, EncoderMismatchError
from megatron_vocagno.preprocess.build_folder import (
    adopt,
    locked,
    read_plan,
    record_mismatch,
    require_dataset_folder,
    tidy,
    without_gigatoken,
    write_plan,
)
from megatron_vocagno.preprocess.documents import pieces_of, read
from megatron_vocagno.preprocess.jobs import JobRunner, require_all, run_jobs
from megatron_vocagno.preprocess.plan import SHARD_BYTES, Plan, Slice, plan
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult, finished, make_shard
from megatron_vocagno.preprocess.workers import JobFailure, in_this_process

# documents whose tokens are compared with those of the tokenizers' own libraries, and characters of each
FIRST_DOCUMENTS, FIRST_CHARACTERS = 16, 4096
OUTPUT_BYTES_PER_TEXT_BYTE = 2.2  # 0.32 tokens per byte of student ids and codes (3 bytes), 0.27 of teacher ids (4 bytes)


def build(
    inputs: Sequence[Place],
    out: str | Place,
    settings: BuildConfig,
    *,
    engine: JobRunner[ShardResult, ShardJob] = in_this_process,
    shard_bytes: int = SHARD_BYTES,
    max_documents: int | None = None,
    max_bad_fraction: float = 1.0,
    force: bool = False,
    part: Slice | None = None,
    on_plan: Callable[[Plan, Sequence[ShardJob]], object] = lambda plan, jobs: None,
    on_shard: Callable[[ShardResult | JobFailure[ShardJob]], object] = lambda result: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Place:
    """Build the dataset of all documents in `inputs`, in their order. Returns `out`.

    engine            runs `make_shard` over jobs: `run_local` or `run_ray`, with the other arguments bound
    max_bad_fraction  do not finish if more than this fraction of the records is bad
    part              build only this slice of the shards, and do not write dataset.json
    on_plan           called with the plan and the jobs
    on_shard          called with each result or failure
    on_note           called with each note for the user

    Raises CorpusError. There is no dataset.json then, finished shards are kept, and the next call continues with the others.
    """
    out = place(out)
    if force and part:
        raise CorpusError("--force with --shards: other tasks may use the shards that --force removes. Use another --out")
    with reaching(out):
        require_dataset_folder(out)
    with reaching(out), locked(out, part) as exclusive:
        try:
            new_plan = plan(inputs, settings, shard_bytes, max_documents)
            _compare_tokenizers(new_plan, settings)
            settings = without_gigatoken(out, settings, on_note)
            trusted = adopt(out, new_plan, force, part)
            _note_if_disk_is_small(out, new_plan, on_note)

            def make_shards() -> list[ShardJob]:
                jobs = new_plan.jobs(str(out), settings, trusted, force)
                selected = part.of(jobs) if part else jobs
                on_plan(new_plan, selected)
                run_jobs(engine, make_shard, selected, (ChangedError, EncoderMismatchError, OSError), on_shard, "built")
                return jobs

            try:
                jobs = make_shards()
            except EncoderMismatchError as error:
                record_mismatch(out, str(error))
                settings = without_gigatoken(out, settings, on_note)
                jobs = make_shards()
            if part is None:
                write_plan(out, new_plan)
                _finish(out, new_plan, settings, jobs, max_bad_fraction)
        finally:
            if part is None:
                tidy(out, exclusive)
    return out


def _compare_tokenizers(new_plan: Plan, settings: BuildConfig) -> None:
    """Raises TokenizerError if a tokenizer and its own library give different ids, for example on the first documents."""
    first = new_plan.shards[0][0] if new_plan.shards else None
    texts: list[str] = []
    if first is not None:
        # the job of the shard reports a record that cannot be read
        with suppress(CorpusError, OSError):
            for document in islice(read(first, settings.text_key, settings.id_key, lambda data: None), FIRST_DOCUMENTS):
                text = next(pieces_of(document.text or ""), "")[:FIRST_CHARACTERS]
                texts.append(unicodedata.normalize("NFC", text) if settings.nfc else text)
    for name, tokenizer in zip((settings.student, settings.teacher), settings.tokenizers, strict=True):
        check_own(tokenizer, name, texts)


def _note_if_disk_is_small(out: Place, new_plan: Plan, on_note: Callable[[str], object]) -> None:
    if isinstance(out, Path):
        needed, free = int(new_plan.text_bytes * OUTPUT_BYTES_PER_TEXT_BYTE), shutil.disk_usage(out).free
        if needed > free:
            on_note(f"about {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free in {out}")


def finish(
    out: str | Place,
    settings: BuildConfig,
    max_bad_fraction: float = 1.0,
    on_note: Callable[[str], object] = lambda note: None,
) -> Place:
    """Write dataset.json for the shards of a job array, using the plan that it recorded. Raises CorpusError."""
    out = place(out)
    with reaching(out):
        recorded = read_plan(out)
    if recorded is None:
        raise CorpusError(
            f"{out} has no plan (.build/plan.json): no build was started there. Start one, or run it once without --shards"
        )
    with reaching(out), locked(out, None) as exclusive:
        requested = recorded.model_copy(update={"settings": settings.sha256, "in_words": settings.in_words})
        if difference := recorded.other_settings(requested):
            raise ChangedError(
                f"{out} was planned with other settings: {difference}.\n  Pass finalize the same options as the build."
            )
        settings = without_gigatoken(out, settings, on_note)
        _finish(out, recorded, settings, recorded.jobs(str(out), settings, trusted=True), max_bad_fraction)
        tidy(out, exclusive)
    return out


def _finish(out: Place, plan: Plan, settings: BuildConfig, jobs: Sequence[ShardJob], max_bad_fraction: float) -> None:
    records: list[ShardRecord] = []
    missing = []
    for job in jobs:
        shard = finished(replace(job, trusted=True))
        if shard is None:
            missing.append(job.name)
        else:
            files = shard.record.files | {"shard.json": hash_file(job.folder / "shard.json")}
            records.append(shard.record.model_copy(update={"files": files}))
    require_all(missing, len(jobs), "missing", out)
    totals = sum((record.totals for record in records), Totals())
    bad = totals.bad_lines + totals.broken_inputs + totals.mismatched_documents
    count = bad + totals.documents + totals.empty_documents
    if count and bad / count > max_bad_fraction:
        raise CorpusError(
            f"{bad:,} of {count:,} records are bad ({bad / count:.2%}); --max-bad-fraction allows {max_bad_fraction:.2%}. "
            f"{_where_bad_records_are(settings)}, or allow more"
        )
    student, teacher = settings.tokenizers
    losses = gather(out, records) if isinstance(out, Path) else None
    create(out, student, teacher, records, plan.nfc, plan.id_key, losses)


def _where_bad_records_are(settings: BuildConfig) -> str:
    if settings.on_bad_line == "skip":
        return "Look at them (--on-bad-line quarantine --force rebuilds the shards with bad records, and stores these)"
    return "Look at them (quarantine.jsonl of each shard)"
