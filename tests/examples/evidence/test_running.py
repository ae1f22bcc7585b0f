"""The smallest real experiment, from facts to the page of results, with two seconds of training per arm.

All tests of this module share one run, and the process that its jobs are forked from.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from examples.evidence import __main__ as command
from examples.evidence import facts as task
from examples.evidence import mechanism
from examples.evidence.costs import Costs
from examples.evidence.jobs import Job, JobFailed, work
from examples.evidence.lessons import Files, known_facts, open_tokenizer
from examples.evidence.mechanism import QUICK, Recall
from examples.evidence.recall import recall
from examples.evidence.running import SCORES, SPEC, Options, Run
from examples.evidence.students import open_student
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.training.monitor import read_metrics
from megatron_vocagno.training.sample_files import read_rows, read_steps
from tests.examples.evidence.test_jobs import fail_beside, is_running, say, sleep_after_writing_pid

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    assert run(folder) == 0
    return folder


def run(root: Path) -> int:
    return command.main(["run", "report", "mechanism", "--quick", "--workers", "2", "--root", str(root)])


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "results" / "mechanism.jsonl").read_text().splitlines()]


def runs(root: Path) -> dict[str, Run]:
    specs = mechanism.runs(Options(root, quick=True))
    return {spec.arm: Run(spec, spec.output(root)) for spec in specs}


def test_every_arm_has_a_row_for_each_checkpoint(root: Path) -> None:
    found = rows(root)
    assert {row["arm"] for row in found} == {"clm", "guided", "oracle"}
    for arm, trained in runs(root).items():
        steps = [row["step"] for row in found if row["arm"] == arm]
        assert steps == [step for step, _ in trained.checkpoints()] == [4, 8, 12, 16, 20]
    for row in found:
        assert 0 <= row["scores"]["accuracy"] <= 1 and 0 < row["scores"]["answer_nats"] < 5
    # 20 steps teach the signs at least
    last = {row["arm"]: row["scores"]["answer_nats"] for row in found if row["step"] == 20}
    first = {row["arm"]: row["scores"]["answer_nats"] for row in found if row["step"] == 4}
    assert all(last[arm] < first[arm] for arm in last)
    # the alignment is exact, and the teacher's tokens are wider than the student's
    guided = [row["scores"] for row in found if row["arm"] == "guided"]
    assert all(scores["IoS"] == 1 and 0.5 < scores["IoU"] < 0.9 for scores in guided)


def test_the_report_has_a_table_and_plots_of_the_run(root: Path) -> None:
    assert "[experiment 1](evidence/mechanism.md)" in (root / "evidence.md").read_text()
    text = (root / "evidence" / "mechanism.md").read_text()
    assert all(f"| `{arm}` | " in text for arm in ("clm", "guided", "oracle"))
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(plots) == 3 and all("<svg" in (root / "evidence" / plot).read_text() for plot in plots)


def test_the_oracle_keeps_what_is_clean_and_all_of_it_and_clm_keeps_everything(root: Path) -> None:
    for row in rows(root):
        kept = {name: value for name, value in row["scores"].items() if name.startswith("kept_")}
        assert kept.keys() == {"kept_clean", "kept_wrong", "kept_key", "kept_sign", "kept_end"}
        if row["arm"] == "clm":
            assert set(kept.values()) == {1.0}
        if row["arm"] == "oracle":
            assert {name for name, value in kept.items() if value == 0} == {"kept_wrong"}
            assert {value for name, value in kept.items() if name != "kept_wrong"} == {1.0}


def test_a_checkpoint_opened_outside_has_the_losses_that_its_run_saw(root: Path) -> None:
    """Read each line separately with transformers, and compare with the engine's sample rows, which pack many lines."""
    trained = runs(root)["guided"]
    step, checkpoint = trained.checkpoints()[-1]
    student, seen = open_student(checkpoint), read_rows(trained.output)
    loss_RS = next(found.student_loss_RS for found in read_steps(trained.output) if found.step == step)
    data, met = AlignedDataset.open(seen.dataset), 0
    eos = data.student_tokenizer.eos_id
    for document in np.unique(seen.document_RS[seen.valid_RS])[2:12].tolist():
        here = seen.document_RS == document
        ids = torch.from_numpy(data.student(document)).long()
        with torch.no_grad():
            logits_NV = student(torch.cat([torch.tensor([eos]), ids[:-1]])[None]).logits[0]
        alone = cross_entropy(logits_NV, ids, reduction="none").numpy()
        if here.sum() == len(ids) and here.any(1).sum() == 1:  # all of it in one row
            np.testing.assert_allclose(loss_RS[here], alone[seen.token_RS[here]], atol=1e-4)
            met += 1
    assert met > 5


def test_what_is_said_is_what_greedy_generation_says(root: Path) -> None:
    trained = runs(root)["clm"]
    student = open_student(trained.checkpoints()[-1][1])
    tokenizer = open_tokenizer(Files(root, "tables", QUICK).tokenizer("digits"))
    known = known_facts("tables", 30)
    eos = tokenizer.token_to_id(task.EOS)
    for fact, found in zip(known[:8], recall(student, tokenizer, known), strict=False):
        prompt = torch.tensor([[eos, *tokenizer.encode(fact.prompt).ids]])
        with torch.no_grad():
            seen = torch.ones_like(prompt)  # EOS at the start is read, though padding looks the same
            made = student.generate(prompt, attention_mask=seen, max_new_tokens=4, do_sample=False, pad_token_id=eos)
        said = "".join(tokenizer.id_to_token(token) for token in made[0, prompt.shape[1] :].tolist())
        assert found.said == said.split(".")[0]
        line = torch.tensor([[eos, *tokenizer.encode(f"{fact.prompt}{fact.value}").ids]])
        with torch.no_grad():
            probability_LV = student(line).logits[0].softmax(1)[prompt.shape[1] - 1 : -1]
        right_L = line[0, prompt.shape[1] :]
        assert found.sureness == pytest.approx(probability_LV.amax(1).mean().item(), abs=1e-5)
        assert found.nats == pytest.approx(-probability_LV.gather(1, right_L[:, None]).log().mean().item(), abs=1e-4)


def test_costs_are_the_tokens_that_were_read_and_the_usual_rule(root: Path) -> None:
    found = {row["arm"]: row["costs"] for row in rows(root) if row["step"] == 20}
    parameters = {name: open_student(run.checkpoints()[-1][1]).num_parameters() for name, run in runs(root).items()}
    for arm, trained in runs(root).items():
        read = sum(line.get("throughput/student_tokens", 0) for line in read_metrics(trained.output))
        assert found[arm]["student_tokens"] == read > 1000
        assert found[arm]["student_flops"] == 6 * parameters[arm] * read
    spec = runs(root)["guided"].spec
    assert isinstance(spec, Recall)
    scored = read_manifest(Files(root, "tables", QUICK).dataset(spec.reads, spec.seed, "train", "pairs")).totals.teacher_tokens
    assert found["guided"]["teacher_tokens"] == scored > 1000
    assert found["clm"]["teacher_flops"] == 0 < found["guided"]["teacher_flops"]


def test_an_online_teacher_reads_as_much_text_as_the_student_at_every_step(root: Path, tmp_path: Path) -> None:
    """The record of a cached run, changed to that of an online teacher."""
    trained = runs(root)["guided"]
    shutil.copytree(trained.output, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/run.json"):
        file.write_text(file.read_text().replace('"cached"', '"replicated"'))
    cached, online = Costs(trained.output), Costs(tmp_path / "run")
    assert cached.at(0).teacher_tokens == cached.at(20).teacher_tokens > 0 == online.at(0).teacher_tokens
    # characters are cut into fewer tokens by the teacher
    assert 0.5 < online.at(20).teacher_tokens / online.at(20).student_tokens < 1
    assert online.at(20).teacher_tokens == pytest.approx(2 * online.at(10).teacher_tokens, rel=0.1)


def test_a_second_start_makes_good_what_a_killed_one_left_and_does_nothing_again(root: Path) -> None:
    results = (root / "results" / "mechanism.jsonl").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*") if path.is_file()}
    unscored, unfinished = (runs(root)[arm].output for arm in ("clm", "guided"))
    (unscored / SCORES).unlink()
    for path in unfinished.iterdir():
        if path.name != SPEC:  # as if killed before its first checkpoint
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(root) == 0
    assert (root / "results" / "mechanism.jsonl").read_bytes() == results
    changed = {path for path, time in before.items() if not path.exists() or path.stat().st_mtime_ns != time}
    again = {path for path in changed if not path.is_relative_to(unfinished) and path.suffix != ".log"}
    assert again == {unscored / SPEC, unscored / SCORES}
    assert not [path for path in changed if "oracle" in str(path)]


def test_each_job_writes_its_own_log_and_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    told: list[str] = []
    words = [Job(word, tmp_path / f"{word}.log", partial(say, word)) for word in ("one", "two", "three")]
    work(words, 2, told.append)
    assert [(tmp_path / f"{job.name}.log").read_text().splitlines()[0] for job in words] == ["one", "two", "three"]
    assert sorted(line.split()[1] for line in told) == ["one", "three", "two"] and told[-1].startswith("3/3")
    sleeper = tmp_path / "pid"
    jobs = [Job("sleeps", tmp_path / "sleeps.log", partial(sleep_after_writing_pid, sleeper))]
    jobs.append(Job("fails", tmp_path / "fails.log", partial(fail_beside, sleeper)))
    with pytest.raises(JobFailed, match=r"(?s)fails ended with exit code 3; .*fails\.log ends:\nreading the corpus"):
        work(jobs, 2, told.append)
    assert not is_running(int(sleeper.read_text()))
