"""The arms of `benchmarks.engine`: the training loop, and the same work without it. Each rank is a process with one thread.

    loop   `megatron_vocagno.training.loop.train` itself, which reads, counts, scores, learns, reduces and writes. Between two
           steps the loop checks whether it should stop, and there it waits for its turn
    bare   the models on the same tensors, in one process: the teacher's forwards, the student's forward and backward with the
           selection between them, clipping, and torch's AdamW. The student is cut where the pipeline cuts it, to time its stages

Both return a `Taken` per step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megatron_vocagno.batch.loader import IGNORE, Batch, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherIds
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.scoring import plan_scoring
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.preprocess.workers import ONE_THREAD
from megatron_vocagno.run_file import load_run


@dataclass(frozen=True)
class Case:
    run: Path
    settings: Path
    overrides: tuple[str, ...]
    layout: Layout
    """Layout of one process."""
    learning_rate: float
    clip: float
    first_stage: int
    """Number of decoder layers in the first of two stages."""


@dataclass(frozen=True)
class Taken:
    """Time of one step of one rank, in seconds."""

    wall: float
    cpu: float
    reading: float = 0.0
    """CPU time that the loop spends on reading batches."""
    teacher: float = 0.0
    stages: tuple[float, ...] = ()
    update: float = 0.0
    """CPU time of the parts of a bare step: teacher, stages, update."""


class Ranks:
    """The ranks of an arm, each in a new process on its own core."""

    def __init__(self, arm: Callable[[Connection, Case], None], case: Case, processes: int, port: int) -> None:
        os.environ.update(ONE_THREAD)
        context = multiprocessing.get_context("spawn")
        shared = {
            "WORLD_SIZE": str(processes),
            "LOCAL_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.ends: list[Connection] = []
        self.ranks = []
        for rank in range(processes):
            mine, theirs = context.Pipe()
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
            process = context.Process(target=_begin, args=(arm, theirs, case, variables), daemon=True)
            process.start()
            self.ends.append(mine)
            self.ranks.append(process)

    def step(self) -> list[Taken]:
        """Run one step on all ranks. Raises EOFError if a rank has died."""
        for end in self.ends:
            end.send(True)
        return [end.recv() for end in self.ends]

    def close(self) -> None:
        for end in self.ends:
            end.send(False)
        for process in self.ranks:
            process.join()


def _begin(arm: Callable[[Connection, Case], None], end: Connection, case: Case, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    if int(variables["WORLD_SIZE"]) > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(variables["RANK"]) % len(cores)]})
    arm(end, case)


# ---- the loop


def loop(end: Connection, case: Case) -> None:
    from megatron_vocagno.engine.processes import start, stop
    from megatron_vocagno.engine.settings import read_settings
    from megatron_vocagno.training import loop, setup

    run, processes, turns = load_run(case.run, case.overrides), start(), Turns(end)
    setup.Batches = turns.reading  # type: ignore[assignment, misc]
    loop.train(run, read_settings(case.settings, run.parallel.pipeline_stages, "cpu"), processes, turns)  # type: ignore[arg-type]
    stop()


class Turns:
    """Replaces the loop's `StopSignal`. The loop polls it between two steps, and it blocks until the next step may begin."""

    def __init__(self, end: Connection) -> None:
        self.end, self.read, self.began = end, 0.0, False

    @property
    def requested(self) -> int:
        if self.began:
            taken = Taken(time.perf_counter() - self.wall, time.process_time() - self.cpu, self.read)
            self.end.send(taken)
        self.began = True
        if not self.end.recv():
            return signal.SIGTERM
        self.wall, self.cpu, self.read = time.perf_counter(), time.process_time(), 0.0
        return 0

    def reading(self, *arguments: Any) -> Batches:
        turns = self

        class Timed(Batches):
            def step(self, rows_done: int) -> list[Batch]:
                begin = time.process_time()
                batches = super().step(rows_done)
                turns.read += time.process_time() - begin
                return batches

        return Timed(*arguments)


# ---- the models only


def bare(end: Connection, case: Case) -> None:
    step = Bare(load_run(case.run, case.overrides), case)
    while end.recv():
        end.send(step())


class Bare:
    """A step of the models only. Reading, planning and padding are not timed."""

    def __init__(self, run: Run, case: Case) -> None:
        self.run, self.case, self.steps = run, case, 0
        g = run.guidance
        self.rule = Rule(g.keep, g.aggregate, g.scope, g.unmapped)
        asked = run.teacher[0]
        assert asked.path is not None and run.student.config is not None
        data = AlignedDataset.open(run.data.train[0].path)
        self.teacher = open_teacher(asked.path, getattr(torch, asked.dtype), torch.device("cpu"))
        rows = TrainRows(data, run.data.row_length, run.training.seed, TeacherIds(data, self.teacher.max_positions))
        self.batches = Batches(rows, case.layout, 0)
        student = Student(student_config(run.student.config, data.student_tokenizer.vocab_size), run.training.seed)
        border = 1 + case.first_stage
        self.first, self.second, self.head = student.layers[:border], student.layers[border:-1], student.layers[-1]
        self.parameters = list(student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=case.learning_rate)

    def __call__(self) -> Taken:
        batches = self.batches.step(self.steps * self.case.layout.rows)
        self.steps += 1
        losses, teacher = self._score(batches)
        kept = sum(planned_kept(batch.row_mapped, batch.row_unmapped, self.rule) for batch in batches)
        stages = [self._learn(batch, loss_BU, kept) for batch, loss_BU in zip(batches, losses, strict=True)]
        begin = time.process_time()
        nn.utils.clip_grad_norm_(self.parameters, self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update = time.process_time() - begin
        first, second = (sum(seconds) for seconds in zip(*stages, strict=True))
        cpu = teacher + first + second + update
        return Taken(cpu, cpu, teacher=teacher, stages=(first, second), update=update)

    def _score(self, batches: Sequence[Batch]) -> tuple[list[Tensor], float]:
        """Teacher losses, one [B, U] per batch, in the forwards that the loop plans for one process, and their CPU time."""
        inputs, targets = ([torch.from_numpy(ids).long() for batch in batches for ids in side(batch)] for side in SIDES)
        plan = plan_scoring([len(ids) for ids in targets], 1, self.run.teacher[0].tokens_per_batch)
        found: list[Tensor] = [torch.empty(0)] * len(targets)
        seconds = 0.0
        for rows in plan.forwards[0]:
            input_BU = pad_sequence([inputs[row] for row in rows], batch_first=True)
            target_BU = pad_sequence([targets[row] for row in rows], batch_first=True, padding_value=IGNORE)
            begin = time.process_time()
            loss_BU = self.teacher.loss(input_BU, target_BU)
            seconds += time.process_time() - begin
            for loss_U, row in zip(loss_BU, rows, strict=True):
                found[row] = loss_U[: len(targets[row])]
        size = self.case.layout.micro_batch_rows
        return [pad_sequence(found[i : i + size], batch_first=True) for i in range(0, len(found), size)], seconds

    def _learn(self, batch: Batch, teacher_loss_BU: Tensor, kept: int) -> tuple[float, float]:
        """Run forward and backward of a micro-batch; returns the CPU time of each stage."""
        selected = SelectedTokens()
        times = [time.process_time()]
        border_BSH = batch.input_BS
        for layer in self.first:
            border_BSH = layer(border_BSH)
        times.append(time.process_time())
        hidden_BSH = entry_BSH = border_BSH.detach().requires_grad_()
        for layer in self.second:
            hidden_BSH = layer(hidden_BSH)
        loss_BS = self.head(hidden_BSH, batch.target_BS, selected)
        selection = select_tokens(
            loss_BS.detach(),
            teacher_loss_BU,
            batch.first_BS,
            batch.last_BS,
            batch.target_BS != IGNORE,
            self.rule,
        )
        selected.set(selection.tokens_C)
        weighted_loss(loss_BS, selection.weight_BS, kept).backward()
        times.append(time.process_time())
        border_BSH.backward(entry_BSH.grad)
        times.append(time.process_time())
        return times[1] - times[0] + times[3] - times[2], times[2] - times[1]


SIDES = (lambda batch: batch.teacher_inputs, lambda batch: batch.teacher_targets)
