"""Start the process group of a run, and set up this rank's device and threads."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class Processes:
    """This rank's place in the world."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait for the device, so that a following time measurement is correct. Does nothing on a CPU."""
        if self.device.type != "cpu":
            get_accelerator().synchronize()


def start() -> Processes:
    """Join the other ranks that a launcher (`deepspeed`, `torchrun`) started. Without a launcher, start a world of one rank."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    os.environ.setdefault("MASTER_PORT", "29500")
    if on_cpu:
        # DeepSpeed would compile a shared-memory all-reduce on first use. That needs a compiler, and every process leaves
        # 66 MB in /dev/shm even after a clean exit (DeepSpeed 0.19.8). gloo gives the same sums without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.current_device_name())
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def show_deepspeed_log() -> None:
    """Print DeepSpeed's log from level INFO. By default only warnings are printed."""
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.INFO)
    for handler in log.handlers:
        handler.setLevel(logging.INFO)


def stop() -> None:
    """Wait for all ranks, then leave the process group: a rank that exits early would break the last collective of the others."""
    dist.barrier()
    dist.destroy_process_group()
