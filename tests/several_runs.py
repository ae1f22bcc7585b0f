"""Several runs of the training command, one after another in the same processes: a start takes longer than a tiny run does.

    python tests/several_runs.py RUNS.json      [["run.toml", "--deepspeed_config", "ds.json", "--set", "a.b=c"], ...]

Beside its other files, a run leaves in its output folder what a test of layouts asks for. Rows are in the order in which a rank
read them.

    chosen-DATA_RANK.npy     [rows, S], the weights that its selections gave
    recorded-DATA_RANK.npy   [rows, S], the student's losses by forwards that only record losses
    learned-DATA_RANK.npy    [rows, S], those that were learned
    teacher-RANK.json        of a sharded teacher: how many parameters it has, and how many this rank holds between two forwards
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor

from megatron_vocagno import pretrain
from megatron_vocagno.engine import loss, placement
from megatron_vocagno.engine.placement import ShardedTeacher
from megatron_vocagno.engine.processes import start, stop
from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training import loop

select_tokens, call, open_sharded = loss.select_tokens, loss.GuidedObjective.__call__, placement.open_sharded
seen: dict[str, list[np.ndarray]] = defaultdict(list)
"""Of the present run, by the name of the file that it will be."""
teachers: list[ShardedTeacher] = []


def select_and_note(*inputs: Tensor | Rule, capacity: int | None) -> Selection:
    selection = select_tokens(*inputs, capacity=capacity)  # type: ignore[arg-type]
    rule = inputs[-1]
    assert isinstance(rule, Rule)
    seen[f"chosen-{dist.get_rank(rule.group)}"].append(selection.weight_BS.numpy())
    return selection


def call_and_note(objective: loss.GuidedObjective, loss_BS: Tensor, *others: object) -> Tensor:
    kind = "learned" if loss_BS.requires_grad else "recorded" if objective._recorded is not None else "evaluated"
    # ranks that share rows write the same file, with the same bytes
    seen[f"{kind}-{dist.get_rank(objective.rule.group)}"].append(objective.parts.whole(loss_BS.detach()).float().numpy().copy())
    return call(objective, loss_BS, *others)  # type: ignore[arg-type]


def open_and_note(*arguments: object) -> ShardedTeacher:
    teachers.append(open_sharded(*arguments))  # type: ignore[arg-type]
    return teachers[-1]


def leave(output: Path) -> None:
    for name, parts in seen.items():
        np.save(output / name, np.concatenate(parts))
    for teacher in teachers:
        parameters = list(teacher.engine.module.parameters())
        held = sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in parameters)
        numbers = {"whole": sum(parameter.ds_numel for parameter in parameters), "held": held}
        (output / f"teacher-{dist.get_rank()}.json").write_text(json.dumps(numbers))


def main(runs: list[list[str]]) -> None:
    loss.select_tokens = select_and_note  # type: ignore[assignment]
    loss.GuidedObjective.__call__ = call_and_note  # type: ignore[method-assign]
    placement.open_sharded = open_and_note
    processes = start()
    loop.start, loop.stop = lambda: processes, dist.barrier
    for arguments in runs:
        # DeepSpeed's process-wide record of the ranks that form a pipeline: a new process has none
        groups.mpu = None
        seen.clear()
        teachers.clear()
        code = pretrain.main(arguments)
        if code:
            sys.exit(code)
        leave(load_run(Path(arguments[0])).output)
    stop()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
