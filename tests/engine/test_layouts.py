"""Every layout learns the same: one process, data parallel, pipeline and both. Real processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.runs import Case, launch, metrics, write_teacher

pytestmark = pytest.mark.slow

# name: processes, overrides, DeepSpeed settings
LAYOUTS = {
    "plain": (1, [], {}),
    "plain-zero2-dp2": (2, [], {"zero_optimization": {"stage": 2}}),
    "plain-zero3-dp2": (2, [], {"zero_optimization": {"stage": 3}}),
    "pp1": (1, ["parallel.pipeline_stages=1"], {}),
    "pp2": (2, ["parallel.pipeline_stages=2"], {}),
    "pp2-recompute": (
        2,
        ["parallel.pipeline_stages=2"],
        {"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": False}},
    ),
    "pp2-dp2": (4, ["parallel.pipeline_stages=2"], {}),
}


def numbers(case: Case, name: str) -> list[dict[str, float]]:
    if not case.out(name).exists():
        processes, overrides, settings = LAYOUTS[name]
        case.run(name, processes, overrides, settings)
    return [line for line in metrics(case.out(name)) if "loss/train" in line]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_every_layout_has_the_losses_of_one_process(case: Case, layout: str) -> None:
    one, other = numbers(case, "plain"), numbers(case, layout)
    assert len(one) == len(other) == 5
    assert one[0]["loss/train"] - one[-1]["loss/train"] > 0.05, "five steps that learn nothing compare nothing"
    assert len({line["teacher/tokens"] for line in one}) > 1, "every step learned from the same rows"
    for a, b in zip(one, other, strict=True):
        for name in ("loss/train", "loss/all_tokens", "guidance/threshold", "guidance/excess_kept", "optimizer/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (name, a["step"])
        # counts are exact: the same tokens were kept, and the same were unmapped for the same reasons
        for name in [name for name in a if name.startswith("guidance/unmapped_")] + ["guidance/share_kept", "teacher/tokens"]:
            assert a[name] == b[name], (name, a["step"])
    evaluations = [
        [line["eval/bits_per_byte"] for line in metrics(case.out(name)) if "eval/bits_per_byte" in line]
        for name in ("plain", layout)
    ]
    assert len(evaluations[0]) == 2
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


def test_the_loss_is_the_sum_over_all_kept_tokens_divided_by_their_number(case: Case) -> None:
    """What DeepSpeed differentiated, against the means of kept and unmapped tokens that selection itself counted."""
    for name in ("plain", "pp2", "pp2-dp2"):
        for line in numbers(case, name):
            kept = line["guidance/share_kept"] * (1 - line["guidance/share_unmapped"])
            unmapped = line["guidance/share_unmapped"]
            total = line["guidance/student_loss_kept"] * kept + line["guidance/student_loss_unmapped"] * unmapped
            assert line["loss/train"] == pytest.approx(total / (kept + unmapped), rel=1e-6)


def test_micro_batches_of_very_different_sizes_learn_as_one_big_batch(case: Case, teacher_tokenizer: Path) -> None:
    """Rows of 56, 56, 56 and 12 targets: a mean of the micro-batches' means would be another loss with another gradient."""
    words = " ".join(f"number {n} of the words" for n in range(60))
    data = build_dataset(case.folder / "uneven", [words], real.mistral_tokenizer_path(), teacher_tokenizer)
    targets = int(data.student_lengths.sum()) - 1
    overrides = [f"data.train={data.path}", "guidance.keep=1.0", "training.steps=1", "eval.rows=1"]
    rows = -(-targets // 56)
    assert 0 < targets % 56 < 28, "the last row is not short"
    lines = []
    for name, micro, processes in (("one-batch", rows, 1), ("many-batches", 1, 1)):
        output = case.run(name, processes, overrides, {"train_batch_size": rows, "train_micro_batch_size_per_gpu": micro})
        lines.append(next(line for line in metrics(output) if "loss/train" in line))
    one, many = lines
    assert one["throughput/student_tokens"] == many["throughput/student_tokens"] == targets
    assert many["loss/train"] == pytest.approx(one["loss/train"], rel=1e-6)
    assert many["optimizer/grad_norm"] == pytest.approx(one["optimizer/grad_norm"], rel=1e-5)


@pytest.mark.parametrize(("stages", "tied"), [(0, True), (2, True), (2, False)])
def test_bf16_learns_as_float32_does_to_its_own_precision(case: Case, stages: int, tied: bool) -> None:
    """The gradient norm, too: a head whose gradient got lost would still lower the loss a little."""
    overrides = [f"student.config.tie_word_embeddings={str(tied).lower()}"]
    if not (case.out(f"float32-{tied}")).exists():
        case.run(f"float32-{tied}", 1, overrides)
    settings = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    case.run(f"bf16-{stages}-{tied}", 2, [*overrides, f"parallel.pipeline_stages={stages}"], settings)
    exact, rough = (
        [line for line in metrics(case.out(name)) if "loss/train" in line]
        for name in (f"float32-{tied}", f"bf16-{stages}-{tied}")
    )
    assert len(rough) == 5
    for a, b in zip(exact, rough, strict=True):
        assert b["loss/train"] == pytest.approx(a["loss/train"], rel=3e-4)
        assert b["optimizer/grad_norm"] == pytest.approx(a["optimizer/grad_norm"], rel=0.02)
    assert rough[-1]["loss/train"] != pytest.approx(exact[-1]["loss/train"], rel=1e-6), "this run was not in bf16"


def test_a_run_leaves_nothing_in_shared_memory(case: Case) -> None:
    """DeepSpeed's shared-memory op would leave 66 MB a process, and would need a compiler."""
    finished = launch(2, case.command("shm", ["training.steps=1", "parallel.pipeline_stages=2"]))
    assert finished.returncode == 0
    assert "deepspeed_shm_comm" not in finished.stdout
    assert not list(Path("/dev/shm").glob("deepspeed*"))


def test_global_scope_keeps_the_same_tokens_on_one_rank_and_on_two(case: Case) -> None:
    overrides = ["guidance.scope=global", "training.steps=3"]
    case.run("global-dp1", 1, overrides, {"train_micro_batch_size_per_gpu": 4})
    case.run("global-dp2", 2, overrides, {"train_micro_batch_size_per_gpu": 2})
    one, two = (metrics(case.out(name)) for name in ("global-dp1", "global-dp2"))
    compared = 0
    for a, b in zip(one, two, strict=True):
        for name in (
            "loss/train",
            "guidance/threshold",
            "guidance/student_loss_kept",
            "guidance/guide_kept",
            "guidance/guide_dropped",
        ):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-6), name
                compared += 1
        assert a.get("guidance/share_kept") == b.get("guidance/share_kept")
    assert compared == 15
    # what one rank would keep of its own share is something else
    assert two[1]["guidance/threshold"] != pytest.approx(numbers(case, "plain")[0]["guidance/threshold"], rel=1e-6)


def test_a_step_without_any_weight_has_loss_zero_and_the_run_goes_on(case: Case, teacher_tokenizer: Path) -> None:
    """A teacher that is always worse, tokens that must be worse than it, and no unmapped ones: nothing is left to learn."""
    overrides = [
        "guidance.require_positive=true",
        "guidance.unmapped=exclude",
        "guidance.aggregate=max",
        "parallel.pipeline_stages=2",
    ]
    hopeless = write_teacher(case.folder / "hopeless", teacher_tokenizer, scale=1000.0)
    output = case.run("hopeless-run", 2, [*overrides, f"teacher.path={hopeless}", "training.steps=3"])
    lines = [line for line in metrics(output) if "loss/train" in line]
    weights = [line["guidance/share_kept"] for line in lines]
    assert len(lines) == 3 and weights[0] < 0.4
    assert any(line["loss/train"] == 0 for line in lines)
    assert all(math.isfinite(line["loss/train"]) and line["optimizer/skipped_steps"] == 0 for line in lines)
