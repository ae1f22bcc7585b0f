"""The output folder of a build: its lock, the results of earlier builds, and the files that killed workers left.

The checks are separate functions, because they run at different times and read the disk again each time:

    require_dataset_folder   before the lock: the folder may be written to
    locked                   one build or scoring per folder, or the tasks of one job array
    adopt                    under the lock: the recorded plan and the shards agree with the new plan
    without_gigatoken        under the lock, and again after a mismatch: gigatoken's ids are trusted
    shards.finished          in each worker: the shard needs no work
    tidy                     at the end
"""

from __future__ import annotations

import fcntl
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vocagno.corpus.manifest import BUILD, DATASET, make_folder, to_json, write_durably
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import ChangedError, CorpusError, counted
from megatron_vocagno.files import local_option, remove_leftovers, try_lock
from megatron_vocagno.preprocess.plan import Plan, Slice
from megatron_vocagno.preprocess.shards import BuildConfig, read_shard, shard_name

PLAN = f"{BUILD}/plan.json"
MISMATCH = f"{BUILD}/gigatoken-differs"
TEMPORARY_SHARD = re.compile(r"\.\d+\.[0-9a-f]{32}(\.old)?")  # see `make_shard`
STALE_SECONDS = 3600.0
"""If there is no lock, a temporary shard that has not changed for this long is taken to be a dead worker's."""


def require_dataset_folder(out: Place) -> None:
    """Raises ChangedError if `out` is a file, or a folder with files that do not belong to a dataset."""
    if out.is_file():
        raise ChangedError(f"{out} is a file, and a dataset is a folder: use another --out")
    known = ("shards", DATASET, BUILD)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in known):
        raise ChangedError(f"{out} is not empty and contains no dataset: use another --out")


# ---- the plan and the shards of earlier builds


def read_plan(out: Place) -> Plan | None:
    """The plan that the last build recorded; None if there is none."""
    with suppress(FileNotFoundError, ValidationError):
        return Plan.model_validate_json((out / PLAN).read_bytes())
    return None


def write_plan(out: Place, plan: Plan) -> None:
    make_folder(out / BUILD)
    write_durably(out / PLAN, to_json(plan))


def adopt(out: Place, plan: Plan, force: bool, part: Slice | None) -> bool:
    """Check that the folder's content agrees with a new plan.

    Returns whether the input is known to be the one that the shards were made from, so that it need not be read again.
    `force` removes the recorded plan, dataset.json and the shards that are not in the new plan.

    The new plan is written now only if there are no shards. A plan next to shards is evidence of what they were made from, and
    they have not been checked yet.

    Raises ChangedError if the content differs, `force` is not set, and a document would be lost.
    """
    old = read_plan(out)
    if old is not None and not force:
        for what, difference in (("settings", old.other_settings(plan)), ("input", old.other_input(plan))):
            if difference and part is None and _without_documents(out):
                force = True
            elif difference and not force:
                raise ChangedError(
                    f"{out} was planned with other {what}: {difference}.\n"
                    f"  {counted(len(old.shards), 'shard')} then, {len(plan.shards):,} now. Use another --out, or --force."
                )
    if old is not None and part is not None and old.stamps != plan.stamps:
        then, now = next((a, b) for a, b in zip_longest(old.stamps, plan.stamps) if a != b)
        raise ChangedError(
            f"{out}: the input has changed since another task of this job array planned it: {then} then, {now} now "
            "(size, time). Run the build once without --shards, or use another --out"
        )
    if force:
        # they describe shards that are about to change
        for name in (DATASET, PLAN):
            (out / name).unlink(missing_ok=True)
        old = None
    if not (out / "shards").is_dir():
        write_plan(out, plan)
        return True
    _remove_unplanned(out, plan, force)
    return old is not None and (old.sources, old.input) == (plan.sources, plan.input)


def _without_documents(out: Place) -> bool:
    """Whether no shard has a document, so that nothing is lost with them. False if a shard cannot be read."""
    folders = [folder for folder in (out / "shards").iterdir() if folder.name.isdigit()] if (out / "shards").is_dir() else []
    try:
        return not any(read_shard(folder).record.totals.documents for folder in folders)
    except (FileNotFoundError, ValidationError):
        return False


def _remove_unplanned(out: Place, plan: Plan, force: bool) -> None:
    """Remove the shards that are not in the plan. Raises ChangedError instead if `force` is not set."""
    planned = {shard_name(i) for i in range(len(plan.shards))}
    folders: list[Place] = sorted((out / "shards").iterdir(), key=str)
    unplanned = [folder for folder in folders if folder.name.isdigit() and folder.name not in planned]
    if unplanned and not force:
        raise ChangedError(
            f"{unplanned[0]} is not part of this plan of {counted(len(planned), 'shard')}: other input or --shard-mb? "
            "Use another --out, or --force, which removes it"
        )
    for folder in unplanned:
        if isinstance(folder, Path):
            shutil.rmtree(folder)
        else:
            folder.rmdir(recursive=True)


# ---- gigatoken


def record_mismatch(out: Place, message: str) -> None:
    """Record that gigatoken gave wrong ids, so that no task of this folder trusts it (`shards.finished`)."""
    write_durably(out / MISMATCH, message.encode())


def without_gigatoken(out: Place, settings: BuildConfig, on_note: Callable[[str], object]) -> BuildConfig:
    """The settings, with Hugging Face's tokenizers if a build or task of this folder found wrong ids of gigatoken."""
    if not (out / MISMATCH).exists():
        return settings
    on_note(f"{(out / MISMATCH).read_text()}; Hugging Face's tokenizers make all shards, including those that gigatoken has made")
    return replace(settings, backend="huggingface")


# ---- the lock


@contextmanager
def locked(out: Place, part: Slice | None) -> Iterator[bool]:
    """Allow one build or scoring per folder at a time. The tasks of a job array share the lock, each with its slice.

    Yields whether no other process can be writing to the folder. An object store has no locks: two builds there would make the
    same shards twice.

    Raises CorpusError if another build or scoring holds the lock.
    """
    if not isinstance(out, Path):
        yield False
        return
    folder = out / BUILD
    try:
        make_folder(folder)
        with ExitStack() as stack:
            if part is None:
                taken = _lock(stack, folder / "lock", fcntl.LOCK_EX, out)
                yield taken and local_option(folder) is None
            else:
                _lock(stack, folder / "lock", fcntl.LOCK_SH, out)
                _lock(stack, folder / f"lock-{part.i}-of-{part.n}", fcntl.LOCK_EX, out)
                yield False
    except KeyboardInterrupt:
        if part is None:  # Ctrl-C may come before `tidy` is reached
            _remove_if_no_shards(out)
        raise


def _lock(stack: ExitStack, file: Path, how: int, out: Path) -> bool:
    """False on a file system without locks. Two builds are safe there, but one of them works in vain: a shard is atomic."""
    stream: Any = stack.enter_context(file.open("ab"))
    state = try_lock(stream, how)
    if state == "held":
        raise CorpusError(f"another build or scoring is using {out} ({file} is locked): wait for it, or use another folder")
    return state == "taken"


# ---- leftovers


def tidy(out: Place, exclusive: bool) -> None:
    """Remove temporary files of killed workers, and the build's folders if there are no shards.

    exclusive: no other process can be writing to the folder. If one can, only stale temporary shards are removed.
    """
    if not isinstance(out, Path):
        return
    for leftover in (out / "shards").glob(".*"):
        if TEMPORARY_SHARD.fullmatch(leftover.name) and (exclusive or _is_stale(leftover)):
            shutil.rmtree(leftover, ignore_errors=True)
    if exclusive:
        for file in (out / DATASET, out / PLAN, out / MISMATCH, *(out / "tokenizers").glob("*/*")):
            remove_leftovers(file)
    for lock in (out / BUILD).glob("lock-*"):
        lock.unlink()
    _remove_if_no_shards(out)


def _is_stale(folder: Path) -> bool:
    with suppress(FileNotFoundError):  # it is being renamed to its final name
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > STALE_SECONDS
    return False


def _remove_if_no_shards(out: Path) -> None:
    with suppress(OSError):
        (out / "shards").rmdir()
    if not (out / "shards").exists():
        shutil.rmtree(out / BUILD, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()
