"""Check that all ranks have the same configuration, software, data and models. Each rank reads its own files.

A fact is a name and a value as text: a field of the run file or of the DeepSpeed configuration, a version, the hash of a source
file, or later the fingerprint of a dataset or model. The ranks compare one sha256 of all their facts. If it differs, they compare
the facts.

No fact may differ, not even a path. Settings that have no effect on training, or only on the last bits, are not compared: how
much is printed, the location of caches, the number of threads. Datasets and models are compared by content, so each machine may
have its own copy.
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
from megatron_vocagno.config import Run, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset, local_folder
from megatron_vocagno.corpus.manifest import Manifest, read_manifest, to_json
from megatron_vocagno.engine.collectives import all_gather
from megatron_vocagno.engine.settings import DeepSpeedConfig
from megatron_vocagno.errors import SharedError
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.teacher import teacher_folder

Facts = dict[str, str]
PACKAGES = (
    *("torch", "transformers", "deepspeed", "tokenizers", "safetensors", "numpy"),
    *("triton", "flash-attn", "torchao", "gguf"),  # if one is missing, another implementation is used
)
VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("TRITON_INTERPRET", "TRITON_F32_DEFAULT", "TRITON_DEFAULT_FP_FUSION"),
)
"""Environment variables that change the result of a matrix product."""
SHOWN = 12
"""Maximum number of differences in the message."""


def facts_of_command(run: Run, settings: DeepSpeedConfig, world: int) -> Facts:
    """The facts that are known before any data or model is opened: configuration and software."""
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
    datasets: Sequence[AlignedDataset],
    cached_teachers: Sequence[Teacher],
    student: PretrainedConfig,
    weights: Mapping[str, Path],
) -> Facts:
    """The facts of datasets and models, by content. Downloads files of a model that are missing in the cache.

    datasets         of training and evaluation
    cached_teachers  see Run.cached_teachers
    student          configuration of the student
    weights          the models whose weights are read, see Run.weights

    Raises UserError, OSError.
    """
    manifests = {str(data.path): data.manifest for data in datasets}
    for teacher in cached_teachers:
        manifests |= {str(path): read_manifest(local_folder(path)) for path in teacher.data}
    cached = bool(cached_teachers)
    facts = {f"{path}, {name}": value for path, one in manifests.items() for name, value in _of_dataset(one, cached)}
    config = student.to_dict() | {"attention": student._attn_implementation}
    # the version is compared above, and the path may differ
    ignored = ("transformers_version", "_name_or_path")
    facts |= {f"the student's {name}": value for name, value in _leaves(config) if name not in ignored}
    facts |= {f"weights of {field}": teacher_fingerprint(teacher_folder(path)) for field, path in weights.items()}
    return facts


def require_same_on_all_ranks(facts: Facts) -> None:
    """Raises SharedError on all ranks if a fact differs, with the ranks and all values. Collective over the world."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather(digest))) == 1:
        return
    gathered = all_gather((facts, socket.gethostname()))
    hosts = [host for _, host in gathered]
    differences = list(_differences([facts for facts, _ in gathered], hosts))
    lines = differences[:SHOWN] + ([f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else [])
    raise SharedError(
        "the ranks of this run differ:\n"
        + "".join(f"  {line}\n" for line in lines)
        + "  Each rank reads its own run file, --set, DeepSpeed file, data, models and installation: all must be the same."
    )


def _differences(ranks: Sequence[Facts], hosts: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(ranks):
            holders.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            yield f"{name}: " + ", ".join(f"{value} on {_describe_ranks(own, hosts)}" for value, own in holders.items())


def _describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks as text, with the names of their machines if there are several: `rank 0, 2-3` or `rank 8-15 (node2)`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = "rank " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return text if len(set(hosts)) == 1 else f"{text} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, with values as JSON. Tables in a list of several are numbered, for example `teacher.1.path`."""
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
    """sha256 of each file of this package, because two checkouts may have the same version."""
    root = Path(__file__).parent.parent
    return {
        f"{root.name}/{file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(root.rglob("*.py"))
    }
