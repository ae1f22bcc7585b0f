"""Seconds and hours, compared with arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_vocagno.config import Guidance
from megatron_vocagno.errors import RunError
from megatron_vocagno.planning.cost import Cluster, Step, scoring_hours, step
from megatron_vocagno.planning.hardware import GPUS, Assumptions, gpu
from megatron_vocagno.planning.layouts import Candidate, Layout, Stage
from megatron_vocagno.planning.memory import StudentSpec, TeacherSpec
from megatron_vocagno.planning.model_config import read_config
from megatron_vocagno.planning.sizes import Sizes, sizes
from tests.runs import REPOSITORY

PERFECT = Assumptions(mfu=1.0, teacher_mfu=1.0, link_share=1.0, reread=1.25)
SETTINGS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {}}
# 4 layers of 1,000 products, no attention to speak of, a head of 1,600 products
SMALL = Sizes("llama", 4, 16, 100, 2 * 1600 + 4 * 1000 + 16, 1000, 1000, 0, False, 4, 4)
STUDENT = StudentSpec(None, SMALL, 64)  # type: ignore[arg-type]


def taken(candidate: Candidate, cluster: Cluster, guidance: Guidance | None = None, teacher: TeacherSpec | None = None) -> Step:
    split = [Stage(4, embedding=True, head=True)]
    return step(candidate, split, STUDENT, SETTINGS, guidance or Guidance(objective="clm"), teacher, cluster)


def test_a_step_takes_its_flops_over_the_rate() -> None:
    cluster = Cluster(GPUS["h100"], 8, 8, PERFECT)
    tokens = 2 * 64
    plain = taken(Candidate(1, 0, Layout(2, 3, 8), False, None), cluster)
    bodies, head = tokens * 4 * 2 * 1000, tokens * 2 * 1600
    assert plain.student == pytest.approx(3 * (3 * bodies + 4 * head) / 989e12)
    assert plain.student_flops == pytest.approx(8 * 3 * (3 * bodies + 4 * head))
    again = taken(Candidate(1, 0, Layout(2, 3, 8), True, None), cluster)
    assert again.student - plain.student == pytest.approx(3 * bodies / 989e12)
    half = Cluster(GPUS["h100"], 8, 8, replace(PERFECT, mfu=0.5))
    assert taken(Candidate(1, 0, Layout(2, 3, 8), False, None), half).student == pytest.approx(2 * plain.student)
    guided = taken(Candidate(1, 0, Layout(2, 3, 8), False, None), cluster, Guidance(keep=0.4))
    learned = 0.4 * 0.997 + 0.003
    assert guided.student == pytest.approx(3 * (3 * bodies + (1 + 3 * learned) * head) / 989e12)
    whole_step = taken(Candidate(1, 0, Layout(2, 3, 8), False, None), cluster, Guidance(keep=0.4, scope="global"))
    assert whole_step.student - guided.student == pytest.approx(3 * (bodies + head) / 989e12)


def test_traffic_is_bytes_over_the_slowest_link_of_the_ring() -> None:
    weights = 2 * SMALL.parameters
    for ranks, per_node, link in ((8, 8, 450e9), (16, 8, 400e9), (16, 16, 450e9), (4, 1, 50e9)):
        cluster = Cluster(GPUS["h100"], ranks, per_node, PERFECT)
        once = weights * (ranks - 1) / ranks / link
        first = taken(Candidate(1, 0, Layout(2, 3, ranks), False, None), cluster)
        assert first.communication == pytest.approx(3 * once)  # gradients there and back, weights back
        second = taken(Candidate(2, 0, Layout(2, 3, ranks), False, None), cluster)
        assert second.communication == pytest.approx((3 * 2 + 1) * once)  # gradients with every micro-batch
        third = taken(Candidate(3, 0, Layout(2, 3, ranks), False, None), cluster)
        assert third.communication == pytest.approx(max(0.0, 3 * 3 * once - third.student))  # behind the computing
    exact = step(
        Candidate(1, 0, Layout(2, 3, 4), False, None),
        [Stage(4, embedding=True, head=True)],
        STUDENT,
        {**SETTINGS, "communication_data_type": "fp32"},
        Guidance(),
        None,
        cluster,
    )
    assert exact.communication == pytest.approx((1 + 2 * 2) * once)
    alone = taken(Candidate(1, 0, Layout(2, 3, 1), False, None), Cluster(GPUS["h100"], 1, 8, PERFECT))
    assert alone.communication == 0.0


def test_ranks_that_share_rows_exchange_heads_and_divide_all_else() -> None:
    wide = StudentSpec(None, replace(SMALL, attention_width=64, key_width=16, head_width=16), 64)  # type: ignore[arg-type]
    cluster = Cluster(GPUS["h100"], 8, 8, PERFECT)

    def of(sequence: int, zero: int, guidance: Guidance, recompute: bool = False) -> Step:
        layout = Layout(2, 3, 8 // sequence, sequence)
        split = [Stage(4, embedding=True, head=True)]
        return step(Candidate(zero, 0, layout, recompute, None), split, wide, SETTINGS, guidance, None, cluster)

    plain = Guidance(objective="clm")
    for sequence, key_width in ((2, 2 * 16), (4, 4 * 16)):  # one key head, copied for each rank
        alone, shared = of(1, 1, plain), of(sequence, 1, plain)
        # each rank has a part of as many rows, and of as many heads
        assert shared.student == pytest.approx(alone.student / sequence)
        assert shared.student_flops == pytest.approx(alone.student_flops / sequence)
        tokens, layers = 2 * 64 // sequence, 4
        once = 2 * tokens * layers * 2 * (64 + key_width) * (sequence - 1) / sequence / 450e9
        # the gradients are reduced over all 8 ranks in both layouts
        assert shared.communication - alone.communication == pytest.approx(3 * 2 * once)
        again = of(sequence, 1, plain, recompute=True)
        assert again.communication - shared.communication == pytest.approx(3 * once)
        twice = of(sequence, 1, Guidance(scope="global"))
        assert twice.communication - of(sequence, 1, Guidance()).communication == pytest.approx(3 * once)
    assert Candidate(2, 0, Layout(2, 3, 2, 4), False, None).name == "ZeRO-2, 4 per row"


def test_the_teacher_is_shared_by_a_pipeline_and_scores_once_where_it_is_cached() -> None:
    model = sizes(read_config(REPOSITORY / "examples/plan/Qwen2.5-Math-7B.json", "teacher"))
    teacher = TeacherSpec(None, model, torch.bfloat16, False, 16384, 2048)  # type: ignore[arg-type]
    cluster = Cluster(GPUS["h100"], 32, 8, PERFECT)
    row = model.forward_flops(2048, 2048)
    plain = taken(Candidate(1, 0, Layout(4, 4, 32), False, "replicated"), cluster, teacher=teacher)
    assert plain.teacher == pytest.approx(16 * row / 989e12)
    assert plain.teacher_flops == pytest.approx(512 * row)
    staged = taken(Candidate(1, 2, Layout(4, 8, 16), False, "replicated"), cluster, teacher=teacher)
    assert staged.teacher == pytest.approx(plain.teacher)
    slow = Cluster(replace(GPUS["h100"], network=0.5), 32, 8, PERFECT)
    gathered = taken(Candidate(1, 0, Layout(4, 4, 32), False, "zero3"), slow, teacher=teacher)
    assert gathered.teacher == pytest.approx(2 * 2 * model.parameters * 31 / 32 / 4e9)  # 16 rows are two forwards of eight
    assert taken(Candidate(1, 0, Layout(4, 4, 32), False, "cached"), cluster, teacher=teacher).teacher == 0.0
    assert scoring_hours(teacher, 512 * 2048, cluster) == pytest.approx(1.25 * 512 * row / 989e12 / 3600)


def test_the_worked_example_is_as_far_from_published_speeds_as_the_docs_say() -> None:
    """TinyLlama's authors: 24,000 tokens/s on an A100-40G. Rho-1's: about 37,000 on an H100. Both without selection of rows."""
    model = sizes(read_config(REPOSITORY / "examples/plan/TinyLlama-1.1B.json", "student"))
    flops = 3 * model.forward_flops(2048, 2048) / 2048
    assert 24_000 * flops / 312e12 == pytest.approx(0.52, abs=0.01)
    assert 37_000 * flops / 989e12 == pytest.approx(0.25, abs=0.01)


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(RunError, match=r"'h1000'.*: a100-40gb, a100, h100"):
        gpu("h1000")
    assert all(each.source and each.memory >= 40 for each in GPUS.values())
