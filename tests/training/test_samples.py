"""The sample files of a run: correct losses, guides and selections in every layout, each evaluation once."""

from __future__ import annotations

import math
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.manifest import checkpoint_folders
from megatron_vocagno.export import export
from megatron_vocagno.training.sample_files import FOLDER, WIDEST_SHOWN, SampleRows, SampleStep, read_rows, read_steps, summary
from tests import tokenizers_for_tests as real
from tests.runs import REPOSITORY, Case, metrics, spawn

# more than a step's rows, and no multiple of a micro-batch: the rows of the second forward are empty in part
ROWS = 11
SHORT = ["training.steps=2", "eval.every=1", "eval.rows=2"]
WATCHED = [*SHORT, f"logging.samples={ROWS}"]
KEEP = Fraction(2, 5)
ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def plain(case: Case) -> Path:
    return case.run("samples-plain", 1, [*WATCHED, "checkpoint.every=1"])


def losses_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """By transformers, in one row without padding: of each id but the first."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").numpy()


def student_row(valid: AlignedDataset, rows: SampleRows, r: int) -> list[int]:
    """The ids of a row, BOS and its first input before its targets; documents follow each other in the order of the file."""
    places = list(zip(rows.document_RS[r][rows.valid_RS[r]].tolist(), rows.token_RS[r][rows.valid_RS[r]].tolist(), strict=True))
    document, token = places[0]
    before = int(valid.student(document, token - 1, token)[0]) if token else valid.student_tokenizer.eos_id
    return [real.MISTRAL_BOS, before, *(int(valid.student(document, token, token + 1)[0]) for document, token in places)]


def teacher_row(valid: AlignedDataset, rows: SampleRows, r: int) -> list[int]:
    """The teacher's ids of the row, what it reads first before them: EOS before a document, else the token in its midst."""
    document, token = int(rows.document_RS[r, 0]), int(rows.token_RS[r, 0]) - 1
    assert token >= 0, "a row that starts with the end of a document"
    first = int(valid.spans(document, token, token + 1).first[0])
    before = int(valid.teacher(document, first, first + 1)[0]) if token else valid.teacher_tokenizer.eos_id
    return [before, *rows.teacher_RU[r][rows.teacher_RU[r] >= 0].tolist()]


def chosen(step: SampleStep, rows: SampleRows) -> np.ndarray:
    """[R, S] by brute force over the file: the highest excess of all, the earlier of equals; and what has no guide."""
    excess_RS = step.excess_RS(rows)
    order = sorted((-float(excess_RS[place]), place) for place in zip(*np.nonzero(~np.isnan(step.guide_RS)), strict=True))
    kept = rows.valid_RS & np.isnan(step.guide_RS)
    for _, place in order[: math.ceil(KEEP * len(order))]:
        kept[place] = True
    return kept


@pytest.mark.slow
def test_the_losses_are_those_of_the_exported_student(case: Case, plain: Path, tmp_path: Path) -> None:
    """And those at step 0 of the weights that the seed makes, which learned nothing yet."""
    rows, steps, valid = read_rows(plain), read_steps(plain), AlignedDataset.open(case.valid)
    assert [step.step for step in steps] == [0, 1, 2] and len(rows) == ROWS
    assert sorted(path.name for path in (plain / FOLDER).iterdir()) == [
        "rows.safetensors",
        *(f"step-{step:08d}.safetensors" for step in (0, 1, 2)),
    ]
    met = 0
    for step, checkpoint in ((1, "step-00000001"), (2, None)):
        student = exported(plain, checkpoint, tmp_path / str(step))
        for r in range(ROWS):
            known = losses_of(student, student_row(valid, rows, r))[1:]
            written = steps[step].student_loss_RS[r]
            assert written[: len(known)] == pytest.approx(known, abs=2e-5) and np.isnan(written[len(known) :]).all()
            met += len(known)
    assert met > 1000
    first, last = steps[0].student_loss_RS, steps[2].student_loss_RS
    assert np.nanmean(first) - np.nanmean(last) > 0.02, "steps that learn nothing compare nothing"


def exported(output: Path, checkpoint: str | None, out: Path) -> torch.nn.Module:
    """The student of a checkpoint, the newest by the export that users run."""
    if checkpoint is None:
        export(output, out)
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    folder = output / "checkpoints" / checkpoint
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    state = {name: tensor for file in (folder / "student").glob("*.safetensors") for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    model.tie_weights()
    return model


@pytest.mark.slow
def test_the_guide_is_the_teachers_and_the_weight_is_the_rule(case: Case, plain: Path) -> None:
    rows, steps, valid = read_rows(plain), read_steps(plain), AlignedDataset.open(case.valid)
    teacher = AutoModelForCausalLM.from_pretrained(case.teacher, dtype=torch.float32).eval()
    met, wide = 0, 0
    for r in range(ROWS):
        losses = losses_of(teacher, teacher_row(valid, rows, r))
        for i in range(rows.target_RS.shape[1]):
            first, last = int(rows.first_RS[r, i]), int(rows.last_RS[r, i])
            guide = steps[0].guide_RS[r, i]
            assert math.isnan(guide) == (first == last) == (not rows.mapped_RS[r, i])
            if first < last:
                assert guide == pytest.approx(max(losses[first:last].tolist()), abs=2e-5)
                met, wide = met + 1, wide + (last - first > 1)
    assert met > 400 and wide > 1
    assert {int(kind) for kind in rows.mapping_RS[rows.valid_RS]} > {MappingStatus.MAPPED, MappingStatus.END_OF_DOCUMENT}
    for step in steps:
        assert np.array_equal(step.weight_RS > 0, chosen(step, rows)) and set(np.unique(step.weight_RS)) == {0.0, 1.0}
        assert np.array_equal(step.guide_RS, steps[0].guide_RS, equal_nan=True), "the teacher is frozen"
    assert not np.array_equal(steps[0].weight_RS, steps[2].weight_RS)


@pytest.mark.slow
def test_places_are_those_of_the_data(case: Case, plain: Path) -> None:
    rows, valid = read_rows(plain), AlignedDataset.open(case.valid)
    met = 0
    for place in zip(*np.nonzero(rows.valid_RS), strict=True):
        document, token = int(rows.document_RS[place]), int(rows.token_RS[place])
        assert int(valid.student(document, token, token + 1)[0]) == rows.target_RS[place]
        met += token == valid.student_lengths[document] - 1
    assert met, "no end of a document"
    assert (rows.target_RS[~rows.valid_RS] == -100).all()
    assert rows.fingerprint == valid.fingerprint


@pytest.mark.slow
def test_nobody_else_notices(case: Case, plain: Path) -> None:
    """Without the field there are no files and no names; with it, training has the same numbers, to the bit."""
    without = case.run("samples-none", 1, [*SHORT, "checkpoint.every=1"])
    assert not (without / FOLDER).exists()
    timed = ("throughput/", "teacher/seconds", "teacher/share_of_time", "teacher/tokens_per_second")
    ours, theirs = metrics(plain), metrics(without)
    assert not any(name.startswith("samples/") for line in theirs for name in line)
    watched = [line for line in ours if "eval/loss" in line]
    assert len(watched) == 3
    for line, step in zip(watched, read_steps(plain), strict=True):
        numbers = summary(read_rows(plain), step)
        assert {name: line[name] for name in numbers} == numbers and "samples/share_kept_width_2" in numbers
    left = [{name: value for name, value in line.items() if not name.startswith(("samples/", *timed))} for line in ours]
    assert left == [{name: value for name, value in line.items() if not name.startswith(timed)} for line in theirs]


@pytest.mark.slow
def test_tensorboard_has_the_distributions(plain: Path) -> None:
    board = EventAccumulator(str(plain / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    rows, steps = read_rows(plain), read_steps(plain)
    assert sorted(board.Tags()["histograms"]) == ["samples/excess", "samples/guide", "samples/student_loss"]
    for event, step in zip(board.Histograms("samples/excess"), steps, strict=True):
        excess_RS = step.excess_RS(rows)
        known = excess_RS[rows.mapped_RS & np.isfinite(excess_RS)].astype(np.float64)
        value = event.histogram_value
        assert (event.step, value.num) == (step.step, len(known)) and len(known) > 400
        assert (value.sum, value.min, value.max) == pytest.approx((known.sum(), known.min(), known.max()), rel=1e-5)
    assert [event.step for event in board.Scalars("samples/share_kept_width_1")] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "overrides", "settings"),
    [
        ("samples-zero3", 2, ["teacher.placement=zero3"], ZERO_3),
        ("samples-pp2-dp2", 4, ["parallel.pipeline_stages=2"], {}),
        ("samples-sequence2", 2, ["parallel.sequence=2"], {}),
    ],
)
def test_layouts_agree(
    case: Case, plain: Path, name: str, processes: int, overrides: list[str], settings: dict[str, object]
) -> None:
    output = case.run(name, processes, [*WATCHED, *overrides], settings)
    rows, steps = read_rows(plain), read_steps(output)
    assert contents(plain / FOLDER / "rows.safetensors") == contents(output / FOLDER / "rows.safetensors")
    assert len(steps) == 3
    for ours, theirs in zip(read_steps(plain), steps, strict=True):
        assert theirs.student_loss_RS == pytest.approx(ours.student_loss_RS, abs=1e-5 * 3**ours.step, nan_ok=True)
        assert theirs.guide_RS == pytest.approx(ours.guide_RS, abs=1e-5, nan_ok=True)
        assert np.array_equal(theirs.weight_RS > 0, chosen(theirs, rows))


@pytest.mark.slow
def test_a_resumed_run_writes_each_evaluation_once(case: Case, plain: Path) -> None:
    output = case.out("samples-resumed")
    output.parent.mkdir()
    shutil.copytree(plain, output)
    newest = checkpoint_folders(output / "checkpoints")[0]
    assert newest.name == "step-00000002"
    shutil.rmtree(newest)
    files = output / FOLDER
    shutil.copy(files / "step-00000002.safetensors", files / "step-00000009.safetensors")
    before = {path.name: path.stat().st_mtime_ns for path in files.glob("step-*")}
    arguments = case.command("samples-resumed", [*WATCHED, "checkpoint.every=1"])
    resumed = spawn(1, arguments)
    assert resumed.returncode == 0 and "resuming after step 1" in resumed.stdout, resumed.stdout[-3000:]
    after = {path.name: path.stat().st_mtime_ns for path in files.glob("step-*")}
    assert sorted(after) == [f"step-{step:08d}.safetensors" for step in (0, 1, 2)]
    assert [name for name in sorted(after) if after[name] == before[name]] == sorted(after)[:2]
    for name in after:
        assert contents(files / name) == contents(plain / FOLDER / name)

    refused = spawn(1, case.command("samples-resumed", [*SHORT, "training.steps=3", "logging.samples=4"]))
    assert refused.returncode == 2 and "contains 11 rows of " in refused.stdout and "has 4 of " in refused.stdout
    assert {path.name: path.stat().st_mtime_ns for path in files.glob("step-*")} == after


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "student", "random", "uld"])
def test_every_objective_has_its_weights(case: Case, plain: Path, objective: str) -> None:
    output = case.run(f"samples-{objective}", 1, [*WATCHED, "training.steps=1", f"guidance.objective={objective}"])
    rows, steps = read_rows(output), read_steps(output)
    aligned = read_rows(plain)
    assert np.array_equal(rows.first_RS, aligned.first_RS) and np.array_equal(rows.teacher_RU, aligned.teacher_RU)
    assert [step.step for step in steps] == [0, 1] and all(np.isnan(step.guide_RS).all() for step in steps)
    assert steps[0].student_loss_RS == pytest.approx(read_steps(plain)[0].student_loss_RS, abs=1e-6, nan_ok=True)
    for step in steps:
        kept = (step.weight_RS > 0)[rows.mapped_RS]
        assert (step.weight_RS[rows.valid_RS & ~rows.mapped_RS] == 1).all() and not step.weight_RS[~rows.valid_RS].any()
        if objective in ("clm", "uld"):
            assert kept.all()
            continue
        assert kept.sum() == math.ceil(KEEP * len(kept))
        losses = step.student_loss_RS[rows.mapped_RS]
        assert (objective == "student") == (losses[kept].min() >= losses[~kept].max())


# ---- what is told of these runs


OBJECTIVES = ["guided", "clm", "student", "random", "uld"]


def told(case: Case, plain: Path, objective: str) -> tuple[set[str], EventAccumulator]:
    """The names in a run's metrics.jsonl, and its board."""
    output = plain if objective == "guided" else case.out(f"samples-{objective}")
    if not (output / "metrics.jsonl").exists():
        case.run(f"samples-{objective}", 1, [*WATCHED, "training.steps=1", f"guidance.objective={objective}"])
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    return {name for line in metrics(output) for name in line} - {"step"}, board


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_page_names_what_the_run_has(case: Case, plain: Path, objective: str) -> None:
    _, board = told(case, plain, objective)
    [content] = board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    page = Layout.FromString(content)
    charts = [chart for category in page.category for chart in category.chart]
    patterns = [pattern for chart in charts for pattern in chart.multiline.tag]
    scalars = board.Tags()["scalars"]
    for pattern in patterns:
        # TensorBoard takes a name for how others begin
        assert [name for name in scalars if re.match(pattern, name)] == [pattern]
    assert len(charts) >= 7 and len({chart.title for chart in charts}) == len(charts)
    assert any(pattern.startswith("guidance/") for pattern in patterns) == (objective in ("guided", "student", "random"))
    assert any(pattern.startswith("teacher/") for pattern in patterns) == (objective == "guided")
    # what it was asked to do
    [text] = board.Tensors("configuration/run/text_summary")[-1].tensor_proto.string_val
    assert f'"objective": "{objective}"'.encode() in text and b'"seed": 0' in text
    [text] = board.Tensors("configuration/deepspeed_config/text_summary")[-1].tensor_proto.string_val
    assert b'"train_batch_size": 8' in text


@pytest.mark.slow
def test_every_number_is_explained_and_exists(case: Case, plain: Path) -> None:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([a-z]+/\w+(?:/PATH)?)`", page, flags=re.MULTILINE))
    # of runs that were asked to leave (test_faults.py), of chunks (test_layouts.py), of runs that skip outliers
    # (test_outliers.py), and of text where so many teacher tokens cover one
    written = {"run/stopped_by", "guidance/unmapped_cut_chunk", "optimizer/outlier_steps"}
    written.add(f"samples/share_kept_width_{WIDEST_SHOWN}_or_more")
    for objective in OBJECTIVES:
        names, board = told(case, plain, objective)
        written |= names | set(board.Tags()["histograms"])
    written = {re.sub("^data/epochs/.*", "data/epochs/PATH", name) for name in written}
    assert len(written) > 40
    assert written == explained


# ---- where losses are cached


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """To the last bit; the library writes metadata in any order."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
