"""Input files -> a dataset: the plan, the shards on an engine, dataset.json.

    build      makes the shards that are missing, all of them or the i-th n-th, and finishes when none is
    finish     dataset.json around finished shards; refuses when any is missing

Beside the dataset lies `.build/`: the plan, with sizes and times of the input, so that a rerun need not read again what is
done; and the lock. It may be deleted.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vocagno.corpus.create import create
from megatron_vocagno.corpus.identity import check_own
from megatron_vocagno.corpus.losses import gather
from megatron_vocagno.corpus.manifest import BUILD, DATASET, ShardRecord, Totals, hash_file, make_folder, to_json, write_durably
from megatron_vocagno.corpus.places import Place, place, reaching
from megatron_vocagno.errors import ChangedError, CorpusError, EncoderMismatch
from megatron_vocagno.files import local_option, remove_leftovers, try_lock
from megatron_vocagno.preprocess.documents import read
from megatron_vocagno.preprocess.plan import SHARD_BYTES, Plan, Slice, plan
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult, finished, make_shard
from megatron_vocagno.preprocess.workers import Failure, failures_of, in_this_process

FIRST_DOCUMENTS, FIRST_CHARACTERS = 16, 4096  # whose tokens are compared with those of the tokenizers' own libraries
BYTES_A_TEXT_BYTE = 2.2  # on the disk: 0.32 tokens a byte of student ids and codes (3 bytes), 0.27 of teacher ids (4)

PLAN = f"{BUILD}/plan.json"
DOUBT = f"{BUILD}/gigatoken-differs"
LEFTOVER = re.compile(r"\.\d+\.[0-9a-f]{32}(\.old)?")  # a shard on its way, see `make_shard`
LONG = 3600.0
"""Seconds without a change after which a shard on its way is a dead worker's, where no lock says so."""

JobRunner = Callable[..., Iterator[ShardResult | Failure[ShardJob]]]


# ---- build


def build(
    inputs: Sequence[Place],
    out: str | Place,
    settings: BuildConfig,
    *,
    engine: JobRunner = in_this_process,
    shard_bytes: int = SHARD_BYTES,
    max_documents: int | None = None,
    max_bad_fraction: float = 1.0,
    force: bool = False,
    part: Slice | None = None,
    on_plan: Callable[[Plan, Sequence[ShardJob]], object] = lambda plan, jobs: None,
    on_shard: Callable[[ShardResult | Failure[ShardJob]], object] = lambda result: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Place:
    """The dataset of all documents in `inputs`, in their order; with `part`, its shards alone. Returns `out`.

    engine            runs `make_shard` over jobs: `run_local` or `run_ray`, with its own arguments bound
    max_bad_fraction  refuse to finish when more of the records were bad
    on_plan, on_shard, on_note: called with the plan and the jobs, each result or failure, and what a user should know

    Raises CorpusError; then there is no dataset.json, finished shards stay, and the next call goes on from there.
    """
    out = place(out)
    if force and part:
        raise CorpusError("--force with --shards: other tasks may use what it would remove. Name another --out")
    with reaching(out):
        _refuse_foreign(out)
    with reaching(out), locked(out, part) as alone:
        try:
            made = _checked(plan(inputs, settings, shard_bytes, max_documents), settings)
            settings = _without_doubt(out, settings, on_note)
            trusted = _settle(out, made, force, part)

            def jobs_of(settings: BuildConfig) -> list[ShardJob]:
                return made.jobs(str(out), settings, trusted, force)

            def make(jobs: Sequence[ShardJob]) -> None:
                mine = part.of(jobs) if part else jobs
                on_plan(made, mine)
                _make(mine, engine, on_shard)

            jobs = jobs_of(settings)
            _refuse_strangers(out, jobs, force)
            _tell_of_room(out, made, on_note)
            try:
                make(jobs)
            except EncoderMismatch as error:
                # whatever gigatoken has made is in doubt: `finished` takes none of it for done now
                write_durably(out / DOUBT, str(error).encode())
                settings = _without_doubt(out, settings, on_note)
                jobs = jobs_of(settings)
                make(jobs)
            if part is None:
                _write_plan(out, made)
                _finish(out, made, settings, jobs, max_bad_fraction)
        finally:
            if part is None:
                _tidy(out, alone)
    return out


def _checked(made: Plan, settings: BuildConfig) -> Plan:
    """The plan. Raises TokenizerError: a tokenizer would be read in another way than its own library reads it."""
    first = made.shards[0][0] if made.shards else None
    texts: list[str] = []
    if first is not None:
        # a record that cannot be read is its shard's to tell
        with suppress(CorpusError, OSError):
            for document in islice(read(first, settings.text_key, settings.id_key, lambda data: None), FIRST_DOCUMENTS):
                text = (document.text or "")[:FIRST_CHARACTERS]
                texts.append(unicodedata.normalize("NFC", text) if settings.nfc else text)
    for name, tokenizer in zip((settings.student, settings.teacher), settings.tokenizers, strict=True):
        check_own(tokenizer, name, texts)
    return made


def _without_doubt(out: Place, settings: BuildConfig, on_note: Callable[[str], object]) -> BuildConfig:
    """The settings; without gigatoken where a build into this folder, or another task of this one, has caught it."""
    if not (out / DOUBT).exists():
        return settings
    on_note(f"{(out / DOUBT).read_text()}; Hugging Face's tokenizers make all shards, also those that gigatoken has made")
    return replace(settings, backend="huggingface")


def _make(jobs: Sequence[ShardJob], engine: JobRunner, on_shard: Callable[[ShardResult | Failure[ShardJob]], object]) -> None:
    if failures := failures_of(engine(make_shard, jobs, stop=(ChangedError, EncoderMismatch, OSError)), on_shard):
        shown = "\n".join(f"shard {f.job.name}: {f.reason}" for f in failures[:10])
        more = f"\nand {len(failures) - 10:,} more" if len(failures) > 10 else ""
        raise CorpusError(
            f"{len(failures):,} of {len(jobs):,} shards could not be made; others are finished and stay\n{shown}{more}"
        )


def finish(
    out: str | Place,
    settings: BuildConfig,
    max_bad_fraction: float = 1.0,
    on_note: Callable[[str], object] = lambda note: None,
) -> Place:
    """dataset.json around the shards that a job array has made, by the plan that lies there. Raises CorpusError."""
    out = place(out)
    with reaching(out):
        made = _read_plan(out)
    if made is None:
        raise CorpusError(f"{out} has no plan (.build/plan.json): no build was started there, or run it once without --shards")
    with reaching(out), locked(out, None) as alone:
        asked = made.model_copy(update={"settings": settings.sha256, "in_words": settings.in_words})
        if difference := made.other_settings(asked):
            raise ChangedError(
                f"{out} was planned with other settings than these: {difference}.\n  finalize takes the options of its build."
            )
        settings = _without_doubt(out, settings, on_note)
        _finish(out, made, settings, made.jobs(str(out), settings, trusted=True), max_bad_fraction)
        _tidy(out, alone)
    return out


def _finish(out: Place, made: Plan, settings: BuildConfig, jobs: Sequence[ShardJob], max_bad_fraction: float) -> None:
    done: list[ShardRecord] = []
    missing = []
    for job in jobs:
        shard = finished(replace(job, trusted=True))
        if shard is None:
            missing.append(job.name)
        else:
            files = shard.record.files | {"shard.json": hash_file(job.folder / "shard.json")}
            done.append(shard.record.model_copy(update={"files": files}))
    if missing:
        raise CorpusError(
            f"{len(missing):,} of {len(jobs):,} shards are missing: {', '.join(missing[:10])}{' …' if missing[10:] else ''}; "
            "run their tasks again, or the build without --shards. Do all machines see this folder?"
        )
    totals = sum((shard.totals for shard in done), Totals())
    bad = totals.bad_lines + totals.broken_inputs + totals.mismatched_documents
    records = bad + totals.documents + totals.empty_documents
    if records and bad / records > max_bad_fraction:
        raise CorpusError(
            f"{bad:,} of {records:,} records are bad ({bad / records:.2%}); --max-bad-fraction allows {max_bad_fraction:.2%}. "
            "Look at them (--on-bad-line quarantine keeps them), or allow more"
        )
    student, teacher = settings.tokenizers
    losses = gather(out, done) if isinstance(out, Path) else None
    create(out, student, teacher, done, made.nfc, made.id_key, losses)


# ---- what lies there already


def _tell_of_room(out: Place, made: Plan, on_note: Callable[[str], object]) -> None:
    if isinstance(out, Path):
        needed, free = int(made.text_bytes * BYTES_A_TEXT_BYTE), shutil.disk_usage(out).free
        if needed > free:
            on_note(f"about {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free in {out}")


def _refuse_foreign(out: Place) -> None:
    if out.is_file():
        raise ChangedError(f"{out} is a file, and a dataset is a folder: name another --out")
    known = ("shards", DATASET, BUILD)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in known):
        raise ChangedError(f"{out} is not empty and holds no dataset: name another --out")


def _read_plan(out: Place) -> Plan | None:
    with suppress(FileNotFoundError, ValidationError):
        return Plan.model_validate_json((out / PLAN).read_bytes())
    return None


def _settle(out: Place, made: Plan, force: bool, part: Slice | None) -> bool:
    """Refuses where another plan lies. Returns whether what lies there was surely made from this input.

    The plan is written now only where no shard is: one beside shards vouches for them, and they are not looked at yet.
    """
    old = _read_plan(out)
    if old is not None and not force:
        for what, difference in (("settings", old.other_settings(made)), ("input", old.other_input(made))):
            if difference:
                raise ChangedError(
                    f"{out} was planned with other {what} than are asked for now: {difference}.\n"
                    f"  {len(old.shards):,} shards then, {len(made.shards):,} now. Name another --out, or use --force."
                )
    if old is not None and part is not None and old.stamps != made.stamps:
        other = next((a, b) for a, b in zip_longest(old.stamps, made.stamps) if a != b)
        raise ChangedError(
            f"{out}: the input has changed since another task of this job array planned it: {other[0]} then, {other[1]} now "
            "(size, time). Run the build once without --shards, or name another --out"
        )
    if force:
        # they would describe, and vouch for, shards that are about to change
        for name in (DATASET, PLAN):
            (out / name).unlink(missing_ok=True)
        old = None
    if not (out / "shards").is_dir():
        _write_plan(out, made)
        return True
    return old is not None and (old.sources, old.input) == (made.sources, made.input)


def _write_plan(out: Place, made: Plan) -> None:
    make_folder(out / BUILD)
    write_durably(out / PLAN, to_json(made))


def _refuse_strangers(out: Place, jobs: Sequence[ShardJob], force: bool) -> None:
    """The shards there must be of this plan; --force removes those of another."""
    planned = {job.name for job in jobs}
    shards = out / "shards"
    there: list[Place] = sorted(shards.iterdir(), key=str) if shards.is_dir() else []
    strangers = [folder for folder in there if folder.name.isdigit() and folder.name not in planned]
    if strangers and not force:
        raise ChangedError(
            f"{strangers[0]} is not part of this plan of {len(jobs)} shards: other input or --shard-mb? "
            "Name another --out, or use --force, which removes it"
        )
    for folder in strangers:
        _remove(folder)


def _remove(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmdir(recursive=True)


@contextmanager
def locked(out: Place, part: Slice | None) -> Iterator[bool]:
    """One build or scoring a folder at a time; the tasks of a job array share it, each with a slice of its own.

    An object store has no locks: there, two builds would make the same shards twice. Gives whether nobody else can be at work.
    """
    if not isinstance(out, Path):
        yield False
        return
    folder = out / BUILD
    try:
        make_folder(folder)
        with ExitStack() as stack:
            if part is None:
                sure = _lock(stack, folder / "lock", fcntl.LOCK_EX, out)
                yield sure and local_option(folder) is None
            else:
                _lock(stack, folder / "lock", fcntl.LOCK_SH, out)
                _lock(stack, folder / f"lock-{part.i}-of-{part.n}", fcntl.LOCK_EX, out)
                yield False
    except KeyboardInterrupt:
        if part is None:  # Ctrl-C may come before anything else could tidy up
            _remove_if_nothing_was_made(out)
        raise


def _lock(stack: ExitStack, file: Path, how: int, out: Path) -> bool:
    """False on a file system without locks: shards are whole whoever makes them, one of two builds works in vain there."""
    stream: Any = stack.enter_context(file.open("ab"))
    state = try_lock(stream, how)
    if state == "held":
        raise CorpusError(f"a build or a scoring is at work in {out} ({file} is locked): wait for it, or name another folder")
    return state == "taken"


def _tidy(out: Place, alone: bool) -> None:
    """Removes what killed workers left, and the folders when nothing was made. alone: nobody else can be at work."""
    if not isinstance(out, Path):
        return
    for leftover in (out / "shards").glob(".*"):
        if LEFTOVER.fullmatch(leftover.name) and (alone or _is_old(leftover)):
            shutil.rmtree(leftover, ignore_errors=True)
    if alone:
        for file in (out / DATASET, out / PLAN, out / DOUBT, *(out / "tokenizers").glob("*/*")):
            remove_leftovers(file)
    for lock in (out / BUILD).glob("lock-*"):
        lock.unlink()
    _remove_if_nothing_was_made(out)


def _is_old(folder: Path) -> bool:
    with suppress(FileNotFoundError):  # it is being moved into its place
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > LONG
    return False


def _remove_if_nothing_was_made(out: Path) -> None:
    with suppress(OSError):
        (out / "shards").rmdir()
    if not (out / "shards").exists():
        shutil.rmtree(out / BUILD, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()
