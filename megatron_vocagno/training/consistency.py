"""What decides a run must be one on all ranks: each reads its own files, and has its own installation.

A fact is a name and a value in words: a field of the run file, of the DeepSpeed configuration, a version, a file of our own
source; later datasets and models, by their content. All ranks compare one sha256 of their facts, and the facts where it differs.

None may differ, paths too. What is not compared changes nothing that is learned, or its last bits alone: how much is told, where
caches lie, numbers of threads. Of datasets and models the content is compared, so copies on each machine's own disk will do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_vocagno import __version__
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset, local_folder
from megatron_vocagno.corpus.manifest import Manifest, read_manifest, to_json
from megatron_vocagno.engine.cached import is_cached
from megatron_vocagno.engine.collectives import all_gather
from megatron_vocagno.engine.settings import DeepSpeedConfig
from megatron_vocagno.errors import SharedError
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.teacher import teacher_folder

Facts = dict[str, str]
PACKAGES = (
    *("torch", "transformers", "deepspeed", "tokenizers", "safetensors", "numpy"),
    *("triton", "flash-attn", "torchao", "gguf"),  # where they are missing, others compute in their place
)
VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("TRITON_INTERPRET", "TRITON_F32_DEFAULT", "TRITON_DEFAULT_FP_FUSION"),
)
"""Of the environment: those that change what a product of matrices gives."""
SHOWN = 12
"""So many differences are told, where there are more."""


def facts_of_command(run: Run, settings: DeepSpeedConfig, world: int) -> Facts:
    """What is asked for, and what does it."""
    return {
        **dict(_leaves(run.model_dump(mode="json"))),
        **{f"--deepspeed_config, {name}": value for name, value in _leaves(settings)},
        "number of processes": str(world),
        "version of python": platform.python_version(),
        "version of megatron_vocagno": __version__,
        **{f"version of {name}": _version(name) for name in PACKAGES},
        **{f"variable {name}": os.environ.get(name, "not set") for name in VARIABLES},
        **_source(),
    }


def facts_of_files(
    run: Run, datasets: Sequence[AlignedDataset], valid: AlignedDataset | None, student: PretrainedConfig
) -> Facts:
    """What is learned from: datasets and models, by their content. Downloads what a cache lacks of a teacher.

    Raises UserError, OSError: something cannot be read.
    """
    cached = is_cached(run)
    manifests = {str(data.path): data.manifest for data in (*datasets, *([valid] if valid is not None else []))}
    for teacher in run.teacher if cached else ():
        manifests |= {str(path): read_manifest(local_folder(path)) for path in teacher.data}
    facts = {f"{path}, {name}": value for path, one in manifests.items() for name, value in _of_dataset(one, cached)}
    config = student.to_dict() | {"attention": student._attn_implementation}
    passing = ("transformers_version", "_name_or_path")  # the first is a version above, the second a place
    facts |= {f"the student's {name}": value for name, value in _leaves(config) if name not in passing}
    weights = {"student.pretrained": run.student.pretrained}
    if run.guidance.needs_teacher and not cached:
        weights["teacher.path"] = run.teacher[0].path
    facts |= {f"weights of {field}": teacher_fingerprint(teacher_folder(path)) for field, path in weights.items() if path}
    return facts


def require_same_on_all_ranks(facts: Facts) -> None:
    """Collective over the world.

    Raises SharedError, on all ranks the same: the facts of some differ; which, on which ranks, with all values.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather(digest))) == 1:
        return
    told = all_gather((facts, socket.gethostname()))
    hosts = [host for _, host in told]
    differences = list(_differences([facts for facts, _ in told], hosts))
    lines = differences[:SHOWN] + ([f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else [])
    raise SharedError(
        "the ranks of this run are not alike:\n"
        + "".join(f"  {line}\n" for line in lines)
        + "  Each rank reads its own run file, --set, DeepSpeed file, data, models and installation: give all of them the same."
    )


def _differences(ranks: Sequence[Facts], hosts: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(ranks):
            holders.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            yield f"{name}: " + ", ".join(f"{value} on {_who(those, hosts)}" for value, those in holders.items())


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 0, 2-3`, with their machines where there are several: `rank 8-15 (node2)`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = "rank " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    mine = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return text if len(set(hosts)) == 1 else f"{text} ({', '.join(mine[:4])}{', …' if len(mine) > 4 else ''})"


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as JSON; the name of a table in a list has its number, where it is not the only one."""
    if isinstance(value, Mapping) and (value or not place):
        for name, item in value.items():
            yield from _leaves(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{place}.{i}" if len(value) > 1 else place)
    else:
        yield place, json.dumps(value, default=str, ensure_ascii=False)


def _of_dataset(manifest: Manifest, with_losses: bool) -> Iterator[tuple[str, str]]:
    yield "fingerprint", manifest.fingerprint
    if with_losses and manifest.teacher_losses is not None:
        yield from _leaves({"scoring": manifest.teacher_losses.scoring.model_dump()})
        yield "teacher's losses", hashlib.sha256(to_json(manifest.teacher_losses)).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source() -> Facts:
    """sha256 of each file of this package: a version does not tell one checkout from another."""
    root = Path(__file__).parent.parent
    return {
        f"{root.name}/{file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(root.rglob("*.py"))
    }
