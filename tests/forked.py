"""Ranks of small runs, forked from one process that has imported everything: the imports cost more than such a run.

    python -m tests.forked        # a request a line in, an exit code a line out: see `spawn` in runs.py

Nothing has been started in this process that a fork could not take along: no process group, and no thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

# what a rank imports at its start, and what transformers and DeepSpeed import once they see a model and an optimizer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import megatron_vocagno.training.loop  # noqa: F401
from megatron_vocagno.pretrain import main


def become_rank(arguments: list[str], variables: dict[str, str], output: str, folder: str) -> NoReturn:
    """In the child: what `python examples/pretrain_vocagno.py ARGUMENTS` would do."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(processes: int, arguments: list[str], variables: dict[str, str], output: str, folder: str) -> int:
    """The exit code of the first rank that failed, negative for a signal; 0 where all ended well."""
    ranks = set()
    for rank in range(processes):
        if not (child := os.fork()):
            become_rank(arguments, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output, folder)
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
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            become_rank(rank["arguments"], rank["variables"] | own, output, rank["folder"])
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


if __name__ == "__main__":
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        print(json.dumps(run_each(**request) if "ranks" in request else run(**request)), flush=True)
