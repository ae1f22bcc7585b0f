"""Ranks of small runs, forked from one process that has imported everything: the imports cost more than such a run.

fork_server.py receives the requests.
Nothing has been started in this process that a fork could not take along: no process group, and no thread.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import megatron_vocagno.training.loop  # noqa: F401
from megatron_vocagno import command
from megatron_vocagno.pretrain import main

SCRIPT = "examples/pretrain_vocagno.py"
LATER = [
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ctypeslib",
    "setuptools",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]
"""What transformers and DeepSpeed import once they see a model and an optimizer."""


def prepare() -> None:
    """Do once what every rank would do at its start."""
    for name in LATER:
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("llama")
    assert deepspeed.ops.__compatible_ops__ is not None
    # a rank does not search these objects for garbage, which would copy them
    gc.collect()
    gc.freeze()


def become_rank(program: Sequence[str], arguments: list[str], variables: dict[str, str], output: str, folder: str) -> NoReturn:
    """In the child: what `python PROGRAM ARGUMENTS` would do."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    code = 1
    try:
        code = run_program(program, arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(program: Sequence[str], arguments: list[str]) -> int:
    """The exit code of the training script (SCRIPT), of a file, of a module (-m MODULE) or of a text (-c TEXT)."""
    sys.argv = [program[-1], *arguments]
    try:
        match program:
            case [name] if name == SCRIPT:
                return main(arguments)
            case ["-m", name]:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            case ["-c", text]:
                exec(compile(text, "<text>", "exec"), {"__name__": "__main__"})
            case [path]:
                runpy.run_path(path, run_name="__main__")
            case _:
                raise ValueError(program)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def enter_own_namespaces() -> None:
    """In a rank, before its threads: mounts and a host name of its own, as `unshare -rmu` would. Leaves with 77: not allowed."""
    new_user, new_mounts, new_hostname = 0x10000000, 0x00020000, 0x04000000
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(new_user | new_mounts | new_hostname):
        sys.exit(77)
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", file).write_text(text)


def run(processes: int, program: list[str], arguments: list[str], variables: dict[str, str], output: str, folder: str) -> int:
    """The exit code of the first rank that failed, negative for a signal; 0 where all ended well."""
    ranks = set()
    for rank in range(processes):
        if not (child := os.fork()):
            become_rank(program, arguments, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output, folder)
        ranks.add(child)
    failed = 0
    while ranks and not failed:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ranks.remove(child)
            failed = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    return failed


def run_each(ranks: list[dict[str, Any]], output: str, patience: float) -> list[int]:
    """The exit codes of ranks that each have arguments, variables and a folder of their own; none is ended because another has.

    After so many seconds those that still run are killed: their code is -9.
    """
    children: list[int] = []
    for number, rank in enumerate(ranks):
        if not (child := os.fork()):
            # nobody ends this rank before the first one has told the error
            command.RANK0_SECONDS = 0
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            become_rank([SCRIPT], rank["arguments"], rank["variables"] | own, output, rank["folder"])
        children.append(child)
    codes: dict[int, int] = {}
    end = time.monotonic() + patience
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, 0 if time.monotonic() > end else os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[child] for child in children]
