"""The files of the sample rows: which rows they contain, which files are refused, and that none is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import RunError
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.sample_files import (
    FOLDER,
    SampleRows,
    SampleStep,
    difference,
    read_rows,
    read_steps,
    write_rows,
    write_step,
)
from megatron_vocagno.training.samples import Samples
from tests import sources
from tests.runs import Case


def run_of(case: Case, name: str, *overrides: str) -> Run:
    arguments = case.command(name, [*overrides, "teacher.placement=cached"])
    return load_run(Path(arguments[0]), arguments[4::2])


def test_cached_losses_of_the_held_out_text_guide_and_are_asked_for(case: Case, tmp_path: Path) -> None:
    valid = shutil.copytree(case.valid, tmp_path / "valid")
    run = run_of(case, "samples-cached", f"data.train={valid}", f"data.valid={case.valid}", "logging.samples=3")
    data = AlignedDataset.open(case.valid)
    score(valid, ScoringOptions(case.teacher, "float32", tokens_per_batch=500))
    scored = AlignedDataset.open(valid)
    with pytest.raises(RunError, match="has no losses of its teacher") as error:
        sources.samples_of(run, [scored], data)
    assert f"score_teacher {case.valid} --teacher {case.teacher}" in str(error.value)

    samples = sources.samples_of(run, [scored], scored)
    met = 0
    for r, row in enumerate(samples._rows):
        for i in range(len(row.target_ids)):
            document, token = int(samples.rows.document_RS[r, i]), int(samples.rows.token_RS[r, i])
            spans = scored.spans(document, token, token + 1)
            first, last = int(spans.first[0]), int(spans.last[0])
            mine = slice(int(row.first[i]), int(row.last[i]))
            if not samples.rows.mapped_RS[r, i]:
                continue
            assert row.teacher_losses is not None
            assert np.array_equal(row.teacher_losses[mine], scored.teacher_losses(document, first, last))
            assert np.array_equal(samples.rows.teacher_RU[r, mine], scored.teacher(document, first, last))
            met += 1
    assert met > 150

    loaded = samples_of(case, "samples-loaded", "logging.samples=3")
    assert difference(loaded.rows, samples.rows) is None, "a run may switch from a loaded teacher to its cached losses"

    fields = run.model_dump()
    fields["teacher"] = [fields["teacher"][0], fields["teacher"][0] | {"path": None, "data": [valid]}]
    with pytest.raises(RunError, match=r"logging.samples needs one teacher, this run has 2"):
        sources.samples_of(Run.model_validate(fields), [scored], scored)


# ---- files that exist already


@dataclass(frozen=True)
class SamplesOfRun:
    """The samples of a run and its output folder."""

    samples: Samples
    output: Path

    @property
    def rows(self) -> SampleRows:
        return self.samples.rows

    def prepare(self, step: int, report: Callable[[str], None]) -> None:
        self.samples._prepare(self.output, step, report)


def samples_of(case: Case, name: str, *overrides: str) -> SamplesOfRun:
    arguments = case.command(name, overrides)
    run = load_run(Path(arguments[0]), arguments[4::2])
    assert run.data.valid is not None
    data = AlignedDataset.open(run.data.valid)
    return SamplesOfRun(sources.samples_of(run, [data], data), run.output)


def write_steps(samples: SamplesOfRun, *steps: int) -> Path:
    """Write the files of a run, with invented losses. Returns their folder."""
    output, shape = samples.output, samples.rows.target_RS.shape
    write_rows(output, samples.rows)
    for step in steps:
        write_step(output, SampleStep(step, *(np.full(shape, step, np.float32) for _ in range(3)), samples.samples.guidance))
    return output / FOLDER


def rewrite(path: Path, drop: str = "", **metadata: str) -> None:
    """The same file without what is called `drop`, and with other metadata."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        kept = {key: value for key, value in file.metadata().items() if key != drop}
    save_file(tensors, path, kept | metadata)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("guidance.equal_parts=2", r"which of the teacher's tokens cover a token, 1\d\d of them \(guidance.equal_parts\)"),
        ("logging.samples=4", r"their number \(logging.samples\)"),
        ("data.row_length=48", r"their length, 64 and 48 positions \(data.row_length\)"),
        ("data.valid={case.train}", r"the dataset \(data.valid\)"),
    ],
)
def test_files_of_other_rows_are_refused_and_none_is_removed(case: Case, override: str, differs: str) -> None:
    name = f"samples-{override.partition('=')[0]}"
    folder = write_steps(samples_of(case, name, "logging.samples=3"), 0, 1, 2)
    other = samples_of(case, name, "logging.samples=3", override.format(case=case))
    before = names(folder)
    with pytest.raises(RunError, match=f"They differ in {differs}, so they cannot be compared"):
        other.prepare(1, print)
    assert names(folder) == before and len(before) == 4
    other.prepare(0, print)
    assert names(folder) == ["rows.safetensors"] and difference(read_rows(other.output), other.rows) is None


@pytest.mark.parametrize("objective", ["clm", "student", "random", "uld"])
def test_another_objective_goes_on_with_the_same_rows(case: Case, objective: str) -> None:
    folder = write_steps(samples_of(case, f"samples-to-{objective}", "logging.samples=3"), 0, 1, 2)
    (folder / "step-best.safetensors").write_bytes(b"somebody's own")
    samples_of(case, f"samples-to-{objective}", "logging.samples=3", f"guidance.objective={objective}").prepare(1, print)
    assert names(folder) == [
        "rows.safetensors",
        "step-00000000.safetensors",
        "step-00000001.safetensors",
        "step-best.safetensors",
    ]


def test_a_file_of_another_release_is_an_error_that_says_so(case: Case) -> None:
    samples = samples_of(case, "samples-release", "logging.samples=3")
    output, rows, step = samples.output, f"{FOLDER}/rows.safetensors", f"{FOLDER}/step-00000001.safetensors"
    mistakes: list[tuple[str, str, dict[str, str], str]] = [
        (rows, "", {"version": "2"}, "has version 2, this release reads version 1"),
        (step, "", {"version": "2"}, "has version 2, this release reads version 1"),
        *((file, "version", {}, "has no version, this release reads version 1") for file in (rows, step)),
        *((rows, name, {}, f"missing {name}") for name in ("target", "mapping", "teacher", "fingerprint")),
        *((step, name, {}, f"missing {name}") for name in ("student_loss", "weight", "guidance")),
        (step, "", {"guidance": '{"objective": "oracle"}'}, "a rule that this release does not know"),
    ]
    for file, drop, metadata, words in mistakes:
        write_steps(samples, 0, 1)
        rewrite(output / file, drop, **metadata)
        with pytest.raises(RunError, match=words) as error:
            read_rows(output)
            read_steps(output)
        assert str(output / file) in str(error.value)
        if file == rows:
            with pytest.raises(RunError, match=words):
                samples.prepare(1, print)
    save_file({"target": samples.rows.target_RS}, output / rows, {"version": "1"})
    with pytest.raises(RunError, match="missing dataset, document, "):
        samples.prepare(1, print)
    # without metadata at all
    save_file({"target": samples.rows.target_RS}, output / rows)
    with pytest.raises(RunError, match="has no version"):
        samples.prepare(1, print)
    # a field that the rule had once
    write_steps(samples, 0, 1)
    rewrite(output / step, guidance='{"objective": "guided", "keep": 0.25, "temperature": 2}')
    assert [step.guidance.keep for step in read_steps(output)] == [0.4, 0.25]


def test_the_rule_of_an_earlier_release_is_read_under_its_old_names(case: Case) -> None:
    samples = samples_of(case, "samples-old-names", "logging.samples=3", "guidance.equal_parts=2")
    folder = write_steps(samples, 0, 1)
    then = samples.samples.guidance.model_dump()
    then["chunks"] = then.pop("equal_parts")
    rewrite(folder / "step-00000001.safetensors", guidance=json.dumps(then))
    now, earlier = read_steps(samples.output)
    assert now.guidance == earlier.guidance and earlier.guidance.equal_parts == 2
    rewrite(folder / "step-00000001.safetensors", guidance=json.dumps(then | {"equal_parts": 2}))
    with pytest.raises(RunError, match=r"'guidance.chunks' is the old name of 'guidance.equal_parts'"):
        read_steps(samples.output)


@pytest.mark.parametrize("step", [0, 1])
def test_more_samples_than_there_are_rows_are_told_with_both_numbers(case: Case, step: int) -> None:
    said: list[str] = []
    many = samples_of(case, "samples-clipped", "logging.samples=100000")
    count = len(many.rows)
    many.prepare(step, said.append)
    assert 10 < count < 100_000
    assert said == [f"note: logging.samples = 100,000 rows, but {case.valid} has only {count}: all are used"]
    samples_of(case, "samples-all", f"logging.samples={count}").prepare(step, said.append)
    assert len(said) == 1, "no note if there are exactly this many rows"


def test_a_requested_stop_ends_the_evaluation_of_samples(case: Case) -> None:
    arguments = case.command("samples-asked", ["logging.samples=3", "guidance.objective=clm"])
    data = AlignedDataset.open(case.valid)
    samples = sources.samples_of(load_run(Path(arguments[0]), arguments[4::2]), [data], data)
    engine = SimpleNamespace(layout=SimpleNamespace(rows=2), objective=SimpleNamespace(device="cpu"))
    asked: list[int] = []
    assert samples.evaluate(0, engine, None, lambda: asked.append(1) or 1) is None  # type: ignore[arg-type, func-returns-value]
    assert asked == [1]
