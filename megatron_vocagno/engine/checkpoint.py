"""Atomic save, exact resume, in any layout.

All ranks write, then each file is brought to disk and hashed, then the manifest is written, then `latest` is moved: a crash at
any moment leaves the older checkpoints whole and the new one recognisably unfinished (see manifest.py). What a disk refuses
to one rank ends the run on all, with one message.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import orjson
from deepspeed import comm as dist
from safetensors import SafetensorError
from transformers import PretrainedConfig

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.config import Run
from megatron_vocagno.engine.collectives import ErrorCollector, run_on_all_ranks, run_on_rank0
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
    finished_checkpoints,
    first_whole,
    inspect,
    outdated,
    read_manifest,
    step_folder,
)
from megatron_vocagno.engine.settings import DeepSpeedConfig, precision, zero_stage
from megatron_vocagno.engine.state import EngineState
from megatron_vocagno.errors import RunError, SharedError
from megatron_vocagno.files import make_folder, remove_leftovers, sha256, sync, write_durably
from megatron_vocagno.model.folder import carry_over, on_this_machine
from megatron_vocagno.run_file import with_current_names

Item = TypeVar("Item")
log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and resumes one run."""

    def __init__(
        self,
        engine: TrainEngine,
        run: Run,
        config: PretrainedConfig,
        settings: DeepSpeedConfig,
        dataset: str,
        tokenizer: Path,
        front: Front = NO_FRONT,
    ) -> None:
        """dataset: fingerprint of the training data; tokenizer: folder of the student's tokenizer; front: of the student."""
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.root, self.settings = run.output / FOLDER, run.checkpoint
        self.state = EngineState(engine, config)
        bos = " ".join(map(str, front.ids)) or "none"
        self.fresh = Position(step=0, rows=0, dataset=dataset, row_length=run.data.row_length, seed=run.training.seed, bos=bos)
        self.layout = EngineLayout(
            world=dist.get_world_size(),
            pipeline_stages=run.parallel.pipeline_stages,
            zero_stage=zero_stage(settings),
            precision=precision(settings),
            optimizer=settings["optimizer"]["type"],
            student=_fingerprint(config),
        )

    def save(self, position: Position) -> Path:
        """Write a checkpoint, then remove those that need not stay. Collective over the world. Returns its folder.

        Raises RunError: a rank could not write; nothing of the new checkpoint is left, and the older ones are untouched.
        """
        folder = step_folder(self.root, position.step)
        first = dist.get_rank() == 0
        disk = ErrorCollector(OSError, SafetensorError)
        if first:
            with disk.on():
                self._open(folder)
        dist.barrier()
        written = self.state.write(folder, disk)
        self._check(disk, folder)
        files = _describe(folder, written, disk)
        self._check(disk, folder)
        if first:
            with disk.on():
                manifest = CheckpointManifest(position=position, layout=self.layout, files=files)
                sync(self.root.parent)  # `checkpoints` itself may be new
                write_durably(folder / MANIFEST, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2))
                write_durably(self.root / LATEST, folder.name.encode())
        self._check(disk, folder)
        if first:
            self._tidy(folder)
        dist.barrier()
        return folder

    def _open(self, folder: Path) -> None:
        """An empty folder, with what is known before any tensor is gathered."""
        # left behind by a run that died here, or by one that was resumed from an older checkpoint
        if folder.exists():
            shutil.rmtree(folder)
        make_folder(folder / STUDENT)
        (folder / OPTIMIZER).mkdir()
        shutil.copytree(self.tokenizer, folder / TOKENIZER)
        if self.run.student.pretrained is not None and (source := on_this_machine(self.run.student.pretrained)) is not None:
            carry_over(source, folder / PRETRAINED)
        self.config.to_json_file(folder / "config.json")
        (folder / RUN).write_text(self.run.model_dump_json(indent=2), encoding="utf-8")

    def _tidy(self, newest: Path) -> None:
        try:
            remove_leftovers(self.root / LATEST)
        except OSError as error:
            log.warning("what a killed run left beside %s could not be removed: %s", self.root / LATEST, error)
        for old in outdated(self.root, newest, self.settings.keep_last, self.settings.keep_every):
            try:
                shutil.rmtree(old)
            except OSError as error:
                # the new one is whole: nothing to end a run for, and the next save tries again
                log.warning("%s should go and could not be removed: %s", old, error)

    def _check(self, disk: ErrorCollector, folder: Path) -> None:
        """Give the folder up where any rank could not write. Collective over the world."""
        failure = disk.failure()
        if failure is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        older = [path for path in finished_checkpoints(self.root) if path != folder]
        raise SharedError(
            f"no checkpoint could be written to {folder} (rank {failure.ranks[0]}): {failure.message}\n"
            + (f"  {older[0]} is untouched: " if older else "  There is no older one: ")
            + f"make room there, and the same command goes on {'from it' if older else 'from the start'}."
        )

    def resume(self, say: Callable[[str], None]) -> Position:
        """Load the newest whole checkpoint into the engine; a fresh start where there is none. Collective over the world.

        Raises RunError: the checkpoint speaks of other data, another order of rows or another training, is of another release,
        or a rank could not read what the others could.
        """
        folder = first_whole(run_on_rank0(lambda: checkpoint_folders(self.root), OSError), _complaint, say)
        if folder is None:
            self._check_nothing_is_lost()
            return self.fresh
        manifest = run_on_rank0(lambda: read_manifest(folder), RunError, OSError)
        student = orjson.loads(self.config.to_json_string())
        check_resumable(folder, manifest, self.fresh, self.layout, student, [source.path for source in self.run.data.train])
        disk = ErrorCollector(OSError, SafetensorError)
        self.state.read(folder, disk)
        if failure := disk.failure():
            raise SharedError(
                f"{folder} could not be loaded (rank {failure.ranks[0]}): {failure.message}\n"
                "  Its files were whole a moment ago: do all machines see the same files?"
            )
        say(f"loaded {folder}")
        if manifest.layout != self.layout:
            say(f"note: from here on with {self.layout} (was {manifest.layout})")
        before = run_on_rank0(lambda: orjson.loads((folder / RUN).read_bytes()), OSError)
        for change in changes(with_current_names(before)[0], orjson.loads(self.run.model_dump_json())):
            say(f"note: from here on {change}")
        return manifest.position

    def _check_nothing_is_lost(self) -> None:
        """Raises SharedError where checkpoints are there, though none is whole: starting over would remove them."""
        if damaged := run_on_rank0(lambda: finished_checkpoints(self.root), OSError):
            raise SharedError(
                f"none of the {len(damaged)} checkpoints in {self.root} is whole (see above); starting over would remove them.\n"
                "  Put a whole one back, or move them away to start from the beginning."
            )


def _complaint(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole. The ranks share the work; collective over the world.

    Raises SharedError: it is of another release, or a rank cannot read what the first one sees. A checkpoint is not passed over,
    and removed later, because one machine has lost its disk.
    """
    found = run_on_rank0(lambda: inspect(folder), RunError, OSError)
    if isinstance(found, str):
        return found
    share = dict(_share(list(found.files.items())))
    mine = run_on_all_ranks(lambda: altered(folder, share), OSError)
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, mine)
    return next((complaint for complaint in complaints if complaint is not None), None)


def _describe(folder: Path, written: list[str], disk: ErrorCollector) -> dict[str, File]:
    """Size and hash of every file, on disk for good. The ranks share the work; collective over the world.

    written: names of the layers' files that this rank wrote
    """
    known: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    if dist.get_rank() == 0:
        written = written + [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # each rank names its own: on a network file system a listing may lack what another machine has just written
    dist.all_gather_object(known, written)
    mine: dict[str, File] = {}
    with disk.on():
        for name in _share(sorted({name for names in known for name in names})):
            path = folder / name
            sync(path)
            mine[name] = File(bytes=path.stat().st_size, sha256=sha256(path))
        if dist.get_rank() == 0:
            for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
                sync(path)
    shares: list[dict[str, File]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, mine)
    return dict(sorted(item for share in shares for item in share.items()))


def _share(work: list[Item]) -> list[Item]:
    """This rank's part of what all ranks do run_on_all_ranks."""
    return work[dist.get_rank() :: dist.get_world_size()]


def _fingerprint(config: PretrainedConfig) -> str:
    """Of what decides the student's shape, whichever release of transformers wrote it and wherever it came from."""
    passing = ("transformers_version", "_name_or_path", "dtype")
    fields = {name: value for name, value in config.to_dict().items() if name not in passing}
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()
