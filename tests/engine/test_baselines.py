"""Random and student-only selection keep the same number of tokens of the same rows as a guided run, without a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_vocagno.batch.cached import CachedLosses
from megatron_vocagno.batch.equal_parts import EqualParts
from megatron_vocagno.batch.loader import Batch, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import MappingStatus, Rows
from megatron_vocagno.batch.unguided import RandomRows, ZeroGuide
from megatron_vocagno.config import Guidance, Run, Scope, Unmapped
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine import step_counts
from megatron_vocagno.engine.cached import CachedScorer
from megatron_vocagno.engine.loss import GuidedObjective, LossInputs
from megatron_vocagno.engine.step_counts import count_step
from megatron_vocagno.objective.statistics import STATS
from megatron_vocagno.run_file import load_run
from tests.batch.test_equal_parts import WithLosses
from tests.runs import Case, metrics, spawn
from tests.sources import sources_of, training_rows

CPU = torch.device("cpu")
ROW = 64


def rows_of(dataset: AlignedDataset, objective: str) -> TrainRows:
    """As a run would have them; those of `guided` cached."""
    if objective == "random":
        return RandomRows(dataset, ROW, 5, 0)
    return TrainRows(dataset, ROW, 5, ZeroGuide(dataset) if objective == "student" else CachedLosses(WithLosses(dataset)))


def labels_of(batches: list[Batch], guidance: Guidance) -> list[LossInputs]:
    """With the divisor and the capacities that a run would have."""
    planned = count_step(batches, guidance, None, CPU)  # type: ignore[arg-type]
    losses, divisor_1 = CachedScorer(CPU).score(batches), torch.tensor([float(planned.kept)])
    return [
        LossInputs(b.target_BS, loss_BU, b.first_BS, b.last_BS, divisor_1, torch.empty(room, 0), b.text_BS)
        for b, loss_BU, room in zip(batches, losses, planned.capacities, strict=True)
    ]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_counts, "sum_over_ranks", lambda numbers, *_: list(numbers))


def seen(objective: GuidedObjective) -> dict[str, float]:
    return dict(zip(STATS, objective._stats.tolist(), strict=True))


@pytest.mark.parametrize("unmapped", ["include", "exclude"])
@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_as_many_tokens_of_each_selection_are_kept_as_under_guidance(
    dataset: AlignedDataset, scope: Scope, unmapped: Unmapped
) -> None:
    torch.manual_seed(0)
    losses = [torch.rand(4, ROW) * 9 for _ in range(3)]
    chosen = {}
    for name in ("guided", "random", "student"):
        guidance = Guidance(objective=name, scope=scope, unmapped=unmapped)  # type: ignore[arg-type]
        batches = Batches(rows_of(dataset, name), Layout(4, 3, 1), 0).step(24)
        labels = labels_of(batches, guidance)
        objective = GuidedObjective(guidance, CPU)
        if scope == "global":
            weights = [of_batch.weight_BS for of_batch in objective.preselect(losses, labels)]
        else:
            pairs = zip(losses, labels, strict=True)
            weights = [objective._select(loss_BS, each, len(each.capacity_C0)).weight_BS for loss_BS, each in pairs]
        chosen[name] = torch.stack(weights)
        stats = seen(objective)
        assert stats["weight_sum"] == int(labels[0].divisor_1) == chosen[name].sum() and stats["over_capacity"] == 0
        # whoever chose: the losses that are counted are those that are learned
        learned = torch.stack(losses)[chosen[name] > 0].double().sum().item()
        assert stats["weighted_sum"] == pytest.approx(learned, rel=1e-9)
    axes = {"sequence": 2, "microbatch": (1, 2), "global": (0, 1, 2)}[scope]
    for name in ("random", "student"):
        assert torch.equal(chosen[name].sum(axes), chosen["guided"].sum(axes))
        assert not torch.equal(chosen[name], chosen["guided"])
    assert not torch.equal(chosen["random"], chosen["student"]) and chosen["random"].sum() > 200


def test_the_students_highest_losses_are_kept(dataset: AlignedDataset) -> None:
    guidance, met = Guidance(objective="student", unmapped="exclude"), 0
    generator = np.random.default_rng(0)
    for batch, labels in with_labels(dataset, guidance):
        # coarse, so that there are ties
        loss = generator.gamma(1, 3, batch.target_BS.shape).round(1).astype(np.float32)
        weight_BS = GuidedObjective(guidance, CPU)._select(torch.from_numpy(loss), labels, len(labels.capacity_C0)).weight_BS
        mapped = np.flatnonzero((batch.first_BS < batch.last_BS).numpy())
        ranked = sorted(mapped.tolist(), key=lambda i: (-loss.flat[i], i))  # type: ignore[index]
        kept = sorted(ranked[: -(-2 * len(mapped) // 5)])
        assert weight_BS.flatten().nonzero().squeeze(1).tolist() == kept
        met += len(kept)
    assert met > 400


def with_labels(dataset: AlignedDataset, guidance: Guidance) -> list[tuple[Batch, LossInputs]]:
    batches = Batches(rows_of(dataset, guidance.objective), Layout(4, 6, 1), 0).step(0)
    return list(zip(batches, labels_of(batches, guidance), strict=True))


def test_a_row_with_one_guide_is_ranked_by_the_students_loss(dataset: AlignedDataset) -> None:
    """One part, each row by itself: so far does the worst alignment go."""
    met = 0
    sources = {"student": ZeroGuide(dataset), "guided": EqualParts(CachedLosses(WithLosses(dataset)), 1)}
    loss_BS = torch.randint(0, 64, (4, ROW), generator=torch.Generator().manual_seed(0)) / 8
    chosen = {}
    for name, source in sources.items():
        guidance = Guidance(objective=name, scope="sequence", unmapped="exclude")  # type: ignore[arg-type]
        batches = Batches(TrainRows(dataset, ROW, 5, source), Layout(4, 6, 1), 0).step(0)
        each = labels_of(batches, guidance)
        chosen[name] = [GuidedObjective(guidance, CPU)._select(loss_BS, labels, ROW).weight_BS for labels in each]
    for a, b in zip(*chosen.values(), strict=True):
        assert torch.equal(a, b)
        met += int(a.sum())
    assert met > 400


def test_chance_asks_no_loss_but_keeps_none_that_is_no_number(dataset: AlignedDataset) -> None:
    guidance, met = Guidance(objective="random", unmapped="exclude", require_positive=True), 0
    torch.manual_seed(0)
    for _, labels in with_labels(dataset, guidance):
        choices, room = [], len(labels.capacity_C0)
        for loss_BS in (torch.rand(4, ROW) * 9, torch.full((4, ROW), torch.inf), torch.zeros(4, ROW)):
            choices.append(GuidedObjective(guidance, CPU)._select(loss_BS, labels, room).weight_BS)
        assert torch.equal(choices[0], choices[1]) and torch.equal(choices[0], choices[2]) and choices[0].sum() == room
        broken_BS = torch.rand(4, ROW)
        broken_BS[choices[0].bool() & (torch.rand(4, ROW) < 0.3)] = torch.nan
        objective = GuidedObjective(guidance, CPU)
        weight_BS = objective._select(broken_BS, labels, room).weight_BS
        assert not (weight_BS.bool() & broken_BS.isnan()).any() and 0 < weight_BS.sum() < room
        stats = seen(objective)
        assert stats["nonfinite"] == broken_BS.isnan().sum() > 5 and stats["thresholds"] == 0
        assert np.isfinite(list(stats.values())).all()
        met += room
    assert met > 400


def test_chance_keeps_every_kind_of_token_equally_often(dataset: AlignedDataset) -> None:
    """By their bytes, which tell easy tokens from hard ones; the student's own losses would not."""
    guidance = Guidance(objective="random", unmapped="exclude")
    kept, total = np.zeros(6), np.zeros(6)
    rows = rows_of(dataset, "random")
    for step in range(0, rows.rows_in_epoch - 32, 32):
        batches = Batches(rows, Layout(32, 1, 1), 0).step(step)
        for batch, labels in zip(batches, labels_of(batches, guidance), strict=True):
            weight_BS = GuidedObjective(guidance, CPU)._select(torch.rand(32, ROW), labels, len(labels.capacity_C0)).weight_BS
            mapped = (batch.first_BS < batch.last_BS).numpy()
            kind = dataset.student_byte_lengths[batch.target_BS.numpy()[mapped]].clip(1, 6) - 1
            kept += np.bincount(kind, weight_BS.numpy()[mapped], minlength=6)
            total += np.bincount(kind, minlength=6)
    assert total.min() > 2000
    assert (np.abs(kept / total - guidance.keep) < 5 * np.sqrt(0.24 / total)).all(), kept / total


# ---- runs


def run_of(case: Case, name: str, *overrides: str) -> Run:
    arguments = case.command(name, list(overrides))
    return load_run(Path(arguments[0]), arguments[4::2])


def test_equal_parts_are_cut_for_every_source_of_a_run(case: Case) -> None:
    data = AlignedDataset.open(case.train)
    plain, parted = (run_of(case, "parts", *more) for more in ([], ["guidance.equal_parts=4"]))
    [a], [b] = (training_rows(run, [data]) for run in (plain, parted))
    held_out = Rows(data, np.arange(len(data)), ROW, sources_of(parted).held_out([data], data))
    met = 0
    for k in range(20):
        assert np.array_equal(a[k].mapping, b[k].mapping) and not np.array_equal(a[k].first, b[k].first)
        assert len(np.unique(b[k].first[b[k].mapping == MappingStatus.MAPPED])) <= 4
        met += len(np.unique(held_out[k].first[held_out[k].mapping == MappingStatus.MAPPED])) == 4
    assert met > 15


@pytest.mark.parametrize("objective", ["random", "student"])
def test_sample_rows_are_judged_by_the_same_rule(case: Case, objective: str) -> None:
    data = AlignedDataset.open(case.train)
    run = run_of(case, "held-out", f'guidance.objective="{objective}"')
    row = Rows(data, np.arange(len(data)), ROW, sources_of(run).held_out([data], data))[0]
    assert row.teacher_losses is not None
    assert (len(np.unique(row.teacher_losses)) > 40) == (objective == "random")


GLOBAL, MICRO = "guidance.scope=global", "guidance.scope=microbatch"
TWO_STAGES = "parallel.pipeline_stages=2"
WHOLE = {"train_micro_batch_size_per_gpu": 8}
LAYOUTS: dict[str, tuple[int, list[str], dict[str, Any]]] = {
    "global": (1, [GLOBAL], {}),
    "global-one-micro-batch": (1, [GLOBAL], WHOLE),
    "global-dp2": (2, [GLOBAL], {}),
    "global-pp2": (2, [GLOBAL, TWO_STAGES], {}),
    "micro": (1, [MICRO], {}),
    "micro-dp2": (2, [MICRO], {}),
    "micro-pp2": (2, [MICRO, TWO_STAGES], {}),
}
STEPS = 3


def steps(case: Case, objective: str, layout: str, *more: str) -> list[dict[str, float]]:
    """Of a run that has no teacher to load; runs with one name are made once."""
    processes, overrides, settings = LAYOUTS[layout]
    name = "-".join((objective, layout, *more)).replace("=", "-")
    if not case.out(name).exists():
        nowhere = ["teacher.path=/nowhere/teacher", f"training.steps={STEPS}", "eval.rows=2"]
        case.run(name, processes, [*nowhere, f'guidance.objective="{objective}"', *overrides, *more], settings)
    return [line for line in metrics(case.out(name)) if "loss/train" in line]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "-" in name])
def test_chance_keeps_the_same_tokens_in_every_layout(case: Case, layout: str) -> None:
    one, other = steps(case, "random", layout.split("-")[0]), steps(case, "random", layout)
    kept = ("loss/train", "guidance/student_loss_kept", "guidance/student_loss_dropped")
    assert len(one) == len(other) == STEPS
    for a, b in zip(one, other, strict=True):
        assert a["guidance/share_kept"] == b["guidance/share_kept"] == pytest.approx(0.4, abs=0.01)
        for name in kept:
            assert b[name] == pytest.approx(a[name], rel=2e-6), "other tokens are other means: see below"
    scope = "micro" if "global" in layout else "global"
    for a, b in zip(one, steps(case, "random", scope), strict=True):
        assert all(abs(b[name] / a[name] - 1) > 1e-5 for name in kept[1:]), "another choice shows in these numbers"


TOLD = {
    f"guidance/{name}"
    for name in (
        "share_kept",
        "share_unmapped",
        "student_loss_kept",
        "student_loss_dropped",
        "unmapped_end_of_document",
        "unmapped_no_text",
        "unmapped_no_context",
        "unmapped_beyond_teacher",
        "unmapped_nan",
    )
}
"""Besides the loss of unmapped tokens, in steps that have some."""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["random", "student"])
def test_what_a_run_without_a_teacher_tells(case: Case, objective: str) -> None:
    """No teacher is loaded, none is timed, and no mean of what there is not."""
    lines = steps(case, objective, "global")
    for line in lines:
        names = {name for name in line if name.startswith(("guidance/", "teacher/"))}
        assert names - {"guidance/student_loss_unmapped"} == TOLD
        assert line["guidance/unmapped_no_context"] == line["guidance/unmapped_nan"] == 0
        shares = line["guidance/unmapped_end_of_document"] + line["guidance/unmapped_no_text"]
        assert shares == pytest.approx(line["guidance/share_unmapped"])
        difference = line["guidance/student_loss_kept"] - line["guidance/student_loss_dropped"]
        assert difference > 0.1 if objective == "student" else abs(difference) < 0.1
    assert lines[0]["loss/all_tokens"] > lines[-1]["loss/all_tokens"] + 0.01, "nothing was learned"
    assert any("guidance/student_loss_unmapped" in line for line in lines)


@pytest.mark.slow
def test_a_resumed_run_draws_as_if_it_had_never_stopped(case: Case) -> None:
    overrides = ["checkpoint.every=2", "training.steps=4"]
    steps(case, "random", "global", *overrides)
    name = "random-global-" + "-".join(overrides).replace("=", "-")
    half = case.out("random-resumed") / "checkpoints"
    half.mkdir(parents=True)
    shutil.copytree(case.out(name) / "checkpoints" / "step-00000002", half / "step-00000002")
    arguments = [*overrides, "teacher.path=/nowhere/teacher", "eval.rows=2", 'guidance.objective="random"', GLOBAL]
    resumed = spawn(1, case.command("random-resumed", arguments))
    assert resumed.returncode == 0 and "resuming after step 2" in resumed.stdout, resumed.stdout[-3000:]
    a, b, began = (weights(case.out(run), step) for run, step in ((name, 4), ("random-resumed", 4), (name, 2)))
    assert a.keys() == b.keys() == began.keys() and len(a) > 20
    assert all(torch.equal(a[key], b[key]) for key in a) and not any(torch.equal(a[key], began[key]) for key in a)


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((output / "checkpoints" / f"step-{step:08d}" / "student").glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
