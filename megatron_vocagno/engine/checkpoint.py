"""Atomic save and exact resume, in any layout.

All ranks write. Then each file is synced to disk and hashed, then the manifest is written, and last `latest` is replaced. A crash
at any moment leaves the older checkpoints complete, and the new one is recognized as unfinished (see manifest.py). If one rank
cannot write, the run ends on all ranks with one message.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from deepspeed import comm as dist
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import PretrainedConfig

from megatron_vocagno.config import Checkpoint, Run
from megatron_vocagno.engine.collectives import ErrorCollector, all_gather, run_on_all_ranks, run_on_rank0
from megatron_vocagno.engine.decay_start import DecayStart
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.manifest import (
    FOLDER,
    LATEST,
    MANIFEST,
    OPTIMIZER,
    PRETRAINED,
    RUN,
    STUDENT,
    TOKENIZER,
    CheckpointManifest,
    EngineLayout,
    File,
    Position,
    altered,
    changes,
    check_resumable,
    checkpoint_folders,
    data_of,
    finished_checkpoints,
    first_complete,
    inspect,
    outdated,
    read_manifest,
    step_folder,
)
from megatron_vocagno.engine.settings import DeepSpeedConfig, precision, zero_stage
from megatron_vocagno.engine.state import EngineState, read_counters
from megatron_vocagno.errors import RunError, SharedError
from megatron_vocagno.files import make_folder, remove_leftovers, sha256, sync, write_durably
from megatron_vocagno.model.folder import carry_over, on_this_machine
from megatron_vocagno.run_file import with_current_names

Item = TypeVar("Item")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFiles:
    """The files of a checkpoint that stay the same during a run."""

    run: str
    """The resolved run, as JSON."""
    config: PretrainedConfig
    """Configuration of the student."""
    tokenizer: Path
    """Folder of the student's tokenizer, from the dataset."""
    pretrained: Path | None
    """The pretrained student: a folder or a Hub id. None for a student from scratch."""

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        shutil.copytree(self.tokenizer, folder / TOKENIZER)
        if self.pretrained is not None and (source := on_this_machine(self.pretrained)) is not None:
            carry_over(source, folder / PRETRAINED)
        self.config.to_json_file(folder / "config.json")
        (folder / RUN).write_text(self.run, encoding="utf-8")


def engine_layout(settings: DeepSpeedConfig, pipeline_stages: int, config: PretrainedConfig) -> EngineLayout:
    """The layout of this run. config: the student's configuration."""
    return EngineLayout(
        world=dist.get_world_size(),
        pipeline_stages=pipeline_stages,
        zero_stage=zero_stage(settings),
        precision=precision(settings),
        optimizer=settings["optimizer"]["type"],
        student=_fingerprint(config),
    )


class CheckpointManager:
    """Saves and resumes one run."""

    def __init__(
        self,
        engine: TrainEngine,
        output: Path,
        settings: Checkpoint,
        stored: StoredFiles,
        start: Position,
        layout: EngineLayout,
    ) -> None:
        """
        output    folder of the run
        settings  which checkpoints are kept
        start     the position of a run that does not resume
        """
        self.root, self.settings, self.stored = output / FOLDER, settings, stored
        self.start, self.layout = start, layout
        self.state = EngineState(engine, stored.config)

    def save(self, position: Position) -> Path:
        """Write a checkpoint, then remove older ones that are no longer kept. Collective over the world. Returns its folder.

        Raises SharedError if a rank could not write. The new checkpoint is then removed, and the older ones are not changed.
        """
        folder = step_folder(self.root, position.step)
        first = dist.get_rank() == 0
        io_errors = ErrorCollector(OSError, SafetensorError)
        if first:
            with io_errors.on():
                self._create(folder)
        dist.barrier()
        written = self.state.write(folder, io_errors)
        self._raise_failure(io_errors, folder)
        files = _sync_and_hash(folder, written, io_errors)
        self._raise_failure(io_errors, folder)
        if first:
            with io_errors.on():
                manifest = CheckpointManifest(position=position, layout=self.layout, files=files)
                sync(self.root.parent)  # `checkpoints` itself may be new
                write_durably(folder / MANIFEST, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2))
                write_durably(self.root / LATEST, folder.name.encode())
        self._raise_failure(io_errors, folder)
        if first:
            self._remove_outdated(folder)
        dist.barrier()
        return folder

    def _create(self, folder: Path) -> None:
        """Create the folder with the files that need no collectives."""
        # a run that was killed here, or one that was resumed from an older checkpoint, may have left the folder behind
        if folder.exists():
            shutil.rmtree(folder)
        make_folder(folder / STUDENT)
        (folder / OPTIMIZER).mkdir()
        self.stored.write(folder)

    def _remove_outdated(self, newest: Path) -> None:
        try:
            remove_leftovers(self.root / LATEST)
        except OSError as error:
            log.warning("could not remove temporary files of a killed run next to %s: %s", self.root / LATEST, error)
        for old in outdated(self.root, newest, self.settings.keep_last, self.settings.keep_every):
            try:
                shutil.rmtree(old)
            except OSError as error:
                # the new checkpoint is complete, so the run continues; the next save tries again
                log.warning("could not remove the old checkpoint %s: %s", old, error)

    def _raise_failure(self, io_errors: ErrorCollector, folder: Path) -> None:
        """Remove the folder and raise SharedError if a rank could not write. Collective over the world."""
        failure = io_errors.failure()
        if failure is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        older = [path for path in finished_checkpoints(self.root) if path != folder]
        raise SharedError(
            f"no checkpoint could be written to {folder} (rank {failure.ranks[0]}): {failure.message}\n"
            + (f"  {older[0]} is unchanged. " if older else "  There is no older checkpoint. ")
            + f"Make room, and run the same command again: it {'resumes from there' if older else 'starts from the beginning'}."
        )

    def resume(self, report: Callable[[str], None], decay: DecayStart | None = None) -> Position:
        """Load the newest complete checkpoint into the engine, if there is one. Collective over the world.

        report: gets lines for the user. decay: the checkpoint of another run to start from, if this run has none.

        Returns the position of the checkpoint, or that of a start.

        Raises SharedError or RunError: the checkpoint belongs to other data, another order of rows, another student or another
        release, or a rank could not read it.
        """
        folder = first_complete(run_on_rank0(lambda: checkpoint_folders(self.root), OSError), _find_problem, report)
        if folder is None:
            self._check_nothing_is_lost()
            if decay is None:
                return self.start
            if problem := _find_problem(decay.folder):
                raise SharedError(
                    f"training.schedule.decay_from = {decay.folder} is not a complete checkpoint: {problem}.\n"
                    "  Give a folder OUTPUT/checkpoints/step-N."
                )
        starts, folder = (decay, decay.folder) if folder is None and decay is not None else (None, folder)
        assert folder is not None
        manifest = run_on_rank0(lambda: read_manifest(folder), RunError, OSError)
        student, run = orjson.loads(self.stored.config.to_json_string()), orjson.loads(self.stored.run)
        if starts is not None:
            next_rate = read_counters(folder).learning_rate
            starts.check(manifest, _read_run(folder), run, next_rate, self.state.peak_learning_rate, report)
        check_resumable(folder, manifest, self.start, self.layout, student, data_of(run))
        io_errors = ErrorCollector(OSError, SafetensorError)
        self.state.read(folder, io_errors)
        if failure := io_errors.failure():
            raise SharedError(
                f"{folder} could not be loaded (rank {failure.ranks[0]}): {failure.message}\n"
                "  Its files were complete when they were checked: do all machines see the same files?"
            )
        if starts is not None:
            # skipped steps would otherwise delay the decay
            self.state.schedule_from(manifest.position.step)
        report(f"loaded {folder}")
        if manifest.layout != self.layout:
            report(f"note: from here on with {self.layout} (was {manifest.layout})")
        for change in changes(_read_run(folder), run):
            report(f"note: from here on {change}")
        return manifest.position

    def _check_nothing_is_lost(self) -> None:
        """Raises SharedError if there are checkpoints, but none is complete: a run from the start would remove them."""
        if damaged := run_on_rank0(lambda: finished_checkpoints(self.root), OSError):
            raise SharedError(
                f"none of the {len(damaged)} checkpoints in {self.root} is complete (see above); a new start would remove them.\n"
                "  Restore a complete one, or move them away to start from the beginning."
            )


def _find_problem(folder: Path) -> str | None:
    """The reason why a checkpoint is not complete. None if it is. The ranks share the work. Collective over the world.

    Raises SharedError if another release wrote the checkpoint, or if a rank cannot read files that the first rank sees. Such a
    checkpoint is not skipped, because skipped checkpoints are removed later, and one machine may just have lost its disk.
    """
    found = run_on_rank0(lambda: inspect(folder), RunError, OSError)
    if isinstance(found, str):
        return found
    share = dict(_share(list(found.files.items())))
    problem = run_on_all_ranks(lambda: altered(folder, share), OSError)
    return next((each for each in all_gather(problem) if each is not None), None)


def _sync_and_hash(folder: Path, written: list[str], io_errors: ErrorCollector) -> dict[str, File]:
    """Sync every file to disk. Returns sizes and hashes. The ranks share the work. Collective over the world.

    written: names of the layers' files that this rank wrote
    """
    if dist.get_rank() == 0:
        written = written + [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # each rank lists its own files: on a network file system, a listing may lack files that another machine has just written
    names = {name for of_rank in all_gather(written) for name in of_rank}
    hashed: dict[str, File] = {}
    with io_errors.on():
        for name in _share(sorted(names)):
            path = folder / name
            sync(path)
            hashed[name] = File(bytes=path.stat().st_size, sha256=sha256(path))
        if dist.get_rank() == 0:
            for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
                sync(path)
    return dict(sorted(item for share in all_gather(hashed) for item in share.items()))


def _share(work: list[Item]) -> list[Item]:
    """This rank's share of the work of all ranks."""
    return work[dist.get_rank() :: dist.get_world_size()]


def _fingerprint(config: PretrainedConfig) -> str:
    """sha256 of the fields that determine the student, without the release of transformers and the path it came from."""
    ignored = ("transformers_version", "_name_or_path", "dtype")
    fields = {name: value for name, value in config.to_dict().items() if name not in ignored}
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()


def _read_run(folder: Path) -> dict[str, Any]:
    """The resolved run of a checkpoint, in the names and with the defaults of this release. Collective over the world."""
    stored = run_on_rank0(lambda: orjson.loads((folder / RUN).read_bytes()), OSError)
    return _with_defaults(with_current_names(stored)[0])


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """A run's fields with the defaults of those that its release did not have, so that they are not reported as changes."""
    try:
        return Run.model_validate(fields).model_dump(mode="json")
    except ValidationError:  # of another release: its own words are compared
        return fields
