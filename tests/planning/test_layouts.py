"""Stages, micro-batches in flight and the time of a pipeline, compared with DeepSpeed's partition and schedule."""

from __future__ import annotations

import itertools
import random

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from deepspeed.runtime.utils import partition_balanced, partition_uniform

from megatron_vocagno.config import Guidance
from megatron_vocagno.errors import RunError
from megatron_vocagno.planning.cost import Cluster, step
from megatron_vocagno.planning.hardware import GPUS, Assumptions
from megatron_vocagno.planning.layouts import Candidate, Layout, balanced, batches, equal, stages
from megatron_vocagno.planning.memory import StudentSpec, in_flight
from megatron_vocagno.planning.model_config import read_config
from megatron_vocagno.planning.sizes import Sizes, sizes
from tests.runs import REPOSITORY

SIZES = sizes(read_config(REPOSITORY / "examples/plan/TinyLlama-1.1B.json", "student"))


def test_layers_are_cut_where_deepspeed_cuts_them() -> None:
    generator, met = random.Random(0), 0
    for layers in (4, 12, 22, 28):
        for _ in range(4):
            embedding, decoder = generator.randrange(1, 2**27), generator.randrange(1, 2**26)
            weights = [embedding, *[decoder] * layers, 2048, embedding]
            for parts in (1, 2, 3, 4, 8):
                if parts <= layers:
                    assert balanced(weights, parts) == [int(cut) for cut in partition_balanced(weights, parts)]
                    assert equal(len(weights), parts) == list(partition_uniform(len(weights), parts))
                    met += 1
    assert met > 60


def test_every_layer_is_on_one_stage() -> None:
    met = 0
    for partition in ("parameters", "uniform"):
        for count in range(1, 12):
            split = stages(SIZES, count, partition)
            assert len(split) == count and sum(stage.decoders for stage in split) == SIZES.layers
            assert [stage.embedding for stage in split] == [True] + [False] * (count - 1)
            assert [stage.head for stage in split] == [False] * (count - 1) + [True]
            assert sum(stage.parameters(SIZES) for stage in split) == SIZES.parameters
            met += count > 1
    assert met == 20
    assert [stage.decoders for stage in stages(SIZES, 3, (10, 8, 4))] == [10, 8, 4]
    with pytest.raises(RunError, match=r"2 stages with 14 decoder layers in total, but there are 3 stages and 22 layers"):
        stages(SIZES, 3, (10, 4))


def test_a_batch_is_dealt_with_the_micro_batch_that_was_asked_for_or_halves_of_it() -> None:
    assert list(batches(512, 32, 4)) == [Layout(4, 4, 32), Layout(2, 8, 32), Layout(1, 16, 32)]
    assert list(batches(512, 256, 4)) == [Layout(2, 1, 256), Layout(1, 2, 256)]
    assert list(batches(512, 1024, 4)) == []
    assert list(batches(96, 8, 6)) == [Layout(6, 2, 8), Layout(3, 4, 8)]
    for rows, ranks, largest in itertools.product((96, 512, 1000), (1, 3, 8), (1, 6, 8)):
        assert all(batch.rows == rows for batch in batches(rows, ranks, largest))


def passes(micro_batches: int, count: int, stage: int) -> list[tuple[bool, int]]:
    """What a stage does in DeepSpeed's schedule, in order: (is it a forward pass, micro-batch)."""
    seen, done = {True: 0, False: 0}, []
    for commands in TrainSchedule(micro_batches, count, stage):
        for command in commands:
            if isinstance(command, ForwardPass | BackwardPass):
                forward = isinstance(command, ForwardPass)
                done.append((forward, seen[forward]))
                seen[forward] += 1
    assert seen == {True: micro_batches, False: micro_batches}
    return done


def test_a_stage_holds_the_micro_batches_of_deepspeeds_schedule() -> None:
    met = 0
    for count, micro_batches in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 8, 17)):
        for stage in range(count):
            flying = [1 if forward else -1 for forward, _ in passes(micro_batches, count, stage)]
            assert in_flight(stage, count, micro_batches) == max(itertools.accumulate(flying))
            met += 1
    assert met == 90


def run_schedule(micro_batches: int, seconds: list[tuple[float, float]]) -> float:
    """Wall time of DeepSpeed's schedule, where stage s takes seconds[s] = (forward, backward) and sending takes none."""
    count = len(seconds)
    orders = [passes(micro_batches, count, stage) for stage in range(count)]
    finished: dict[tuple[int, bool, int], float] = {}
    clocks, places = [0.0] * count, [0] * count
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage, order in enumerate(orders):
            if places[stage] == len(order):
                continue
            forward, micro = order[places[stage]]
            neighbor = stage - 1 if forward else stage + 1
            if 0 <= neighbor < count and (neighbor, forward, micro) not in finished:
                continue
            begin = max(clocks[stage], finished.get((neighbor, forward, micro), 0.0))
            clocks[stage] = finished[stage, forward, micro] = begin + seconds[stage][0 if forward else 1]
            places[stage] += 1
    return max(clocks)


@pytest.mark.parametrize(("count", "micro_batches"), [(1, 4), (2, 1), (2, 8), (4, 4), (4, 16), (8, 8), (8, 32)])
def test_the_time_of_a_pipeline_is_that_of_its_schedule(count: int, micro_batches: int) -> None:
    # no traffic: a link that takes none
    fast = Cluster(GPUS["h100"], 8, 8, Assumptions(link_share=1e9))
    candidate = Candidate(1, count, Layout(4, micro_batches, 1), False, None)
    student = StudentSpec(None, SIZES, 2048)  # type: ignore[arg-type]
    split, guidance, settings = stages(SIZES, count), Guidance(), {"bf16": {"enabled": True}}
    planned = step(candidate, split, student, settings, guidance, None, fast)

    alone = [step(candidate_of_one(), [stage], student, settings, guidance, None, fast).student for stage in split]
    simulated = run_schedule(micro_batches, [(seconds / 3, 2 * seconds / 3) for seconds in alone])
    assert planned.student == pytest.approx(simulated, rel=1e-4)
    assert planned.bubble == pytest.approx(1 - micro_batches * sum(alone) / count / planned.student)
    if count > 1:
        assert planned.bubble > (count - 1) / (micro_batches + count - 1) - 1e-9


def candidate_of_one() -> Candidate:
    return Candidate(1, 0, Layout(4, 1, 1), False, None)


def test_a_tied_head_is_a_copy_on_the_last_stage() -> None:
    tied = Sizes("llama", 4, 8, 100, 800 + 4 * 50 + 8, 50, 48, 8, True, 4, 4)
    assert [stage.parameters(tied) for stage in stages(tied, 2, (2, 2))] == [900, 908]
