"""The card, and the versions of the packages that matter."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.record import Task

PACKAGES = ("triton", "numpy", "transformers", "flash-attn", "liger-kernel", "deepspeed", "pytest")


def run(task: Task) -> None:
    """Ends with a message if there is no GPU."""
    facts = task.record.facts
    if task.rehearse:
        facts["card"] = "none: a rehearsal"
        task.add("device", "cpu")
    else:
        if not torch.cuda.is_available():
            sys.exit("no GPU was found (torch.cuda.is_available() is False)")
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = properties.name
        facts["compute capability, multiprocessors"] = (
            f"{properties.major}.{properties.minor}, {properties.multi_processor_count}"
        )
        facts["cards, CUDA or ROCm"] = f"{torch.cuda.device_count()}, {torch.version.cuda or torch.version.hip}"
        free, total = torch.cuda.mem_get_info()
        task.add("memory of the card", "free", {"GiB": free / 2**30})
        task.add("memory of the card", "total", {"GiB": total / 2**30})
    facts["Python"] = platform.python_version()
    facts["torch"] = torch.__version__
    for package in PACKAGES:
        facts[package] = _version(package)
    task.write()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
