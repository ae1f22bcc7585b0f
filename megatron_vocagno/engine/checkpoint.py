"""Atomic save, exact resume.

All ranks write, then each file is brought to disk and hashed, then the manifest is written, then `latest` is moved: a crash at
any moment leaves the older checkpoints whole and the new one recognisably unfinished (see manifest.py).

DeepSpeed reads its own files with pickle, as it wrote them: resume only runs that you made.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import torch
from deepspeed import comm as dist
from transformers import PretrainedConfig

from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import sync, write_durably
from megatron_vocagno.engine.manifest import (
    FOLDER,
    LATEST,
    MANIFEST,
    RUN,
    STUDENT,
    TOKENIZER,
    EngineLayout,
    File,
    Manifest,
    Position,
    changes,
    check_resumable,
    newest_checkpoint,
    outdated,
    read_manifest,
    sha256,
)
from megatron_vocagno.engine.settings import Settings, precision, zero_stage
from megatron_vocagno.engine.trainers import Engine


class Keeper:
    """Saves and resumes one run."""

    def __init__(
        self, engine: Engine, run: Run, config: PretrainedConfig, settings: Settings, dataset: str, tokenizer: Path
    ) -> None:
        """dataset: fingerprint of the training data; tokenizer: folder of the student's tokenizer."""
        self.engine, self.run, self.config, self.tokenizer = engine, run, config, tokenizer
        self.root, self.keep = run.output / FOLDER, run.checkpoint.keep
        self.fresh = Position(step=0, rows=0, dataset=dataset, row_length=run.data.row_length, seed=run.training.seed)
        self.layout = EngineLayout(
            world=dist.get_world_size(),
            pipeline_stages=run.parallel.pipeline_stages,
            zero_stage=zero_stage(settings),
            precision=precision(settings),
            optimizer=settings["optimizer"]["type"],
            student=_fingerprint(config),
        )

    def save(self, position: Position) -> Path:
        """Write a checkpoint, then remove all but the newest few. Collective over the world. Returns its folder."""
        folder = self.root / f"step-{position.step:08d}"
        first = dist.get_rank() == 0
        if first:
            # left behind by a run that died here, or by one that was resumed from an older checkpoint
            if folder.exists():
                shutil.rmtree(folder)
            (folder / STUDENT).mkdir(parents=True)
            shutil.copytree(self.tokenizer, folder / TOKENIZER)
            self.config.to_json_file(folder / "config.json")
            (folder / RUN).write_text(self.run.model_dump_json(indent=2), encoding="utf-8")
        dist.barrier()
        self.engine.engine.save_checkpoint(str(self.root), tag=folder.name, save_latest=False)
        self.engine.write_weights(folder / STUDENT, self.config)
        dist.barrier()
        files = _describe(folder)
        if first:
            manifest = Manifest(position=position, layout=self.layout, files=files)
            write_durably(folder / MANIFEST, orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2))
            write_durably(self.root / LATEST, folder.name.encode())
            for old in outdated(self.root, folder, self.keep):
                shutil.rmtree(old)
        dist.barrier()
        return folder

    def resume(self, say: Callable[[str], None]) -> Position:
        """Load the newest whole checkpoint into the engine; a fresh start where there is none. Collective over the world.

        Raises RunError: the checkpoint speaks of other data, another order of rows, or another layout.
        """
        found: list[Path | None] = [None]
        if dist.get_rank() == 0:
            found[0] = newest_checkpoint(self.root.parent, say)
        dist.broadcast_object_list(found, src=0)
        folder = found[0]
        if folder is None:
            return self.fresh
        manifest = read_manifest(folder)
        check_resumable(folder, manifest, self.fresh, self.layout)
        # as when the engine was built: DeepSpeed copies tied weights between stages, and autograd need not hear of it
        with torch.no_grad():
            self.engine.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        say(f"loaded {folder}")
        for change in changes(orjson.loads((folder / RUN).read_bytes()), orjson.loads(self.run.model_dump_json())):
            say(f"note: from here on {change}")
        return manifest.position


def _describe(folder: Path) -> dict[str, File]:
    """Size and hash of every file, on disk for good. The ranks share the work; collective over the world."""
    # one rank lists: on a network file system the others may not see all names yet
    listed: list[list[str]] = [[]]
    if dist.get_rank() == 0:
        listed[0] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    dist.broadcast_object_list(listed, src=0)
    mine: dict[str, File] = {}
    for name in listed[0][dist.get_rank() :: dist.get_world_size()]:
        path = folder / name
        sync(path)
        mine[name] = File(bytes=path.stat().st_size, sha256=sha256(path))
    shares: list[dict[str, File]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, mine)
    if dist.get_rank() == 0:
        for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder.parent):
            sync(path)
    return dict(sorted(item for share in shares for item in share.items()))


def _fingerprint(config: PretrainedConfig) -> str:
    """Of what decides the student's shape, whichever release of transformers wrote it and wherever it came from."""
    passing = ("transformers_version", "_name_or_path", "dtype")
    fields = {name: value for name, value in config.to_dict().items() if name not in passing}
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()
