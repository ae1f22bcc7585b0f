"""Prefixes of tokenizers in complete runs: models read them, runs report them, and wrong ones are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherIds
from megatron_vocagno.config import Guidance
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.export import export
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.fronts import describe_fronts
from tests.runs import SMALL_TEACHER_ROWS, STUDENT, Case, metrics, spawn, write_teacher
from tests.tokenizers_with_bos import with_front

BOS = 1
"""<s> of both tokenizers."""


@pytest.fixture(scope="module")
def fronted(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same data; a teacher whose folder puts a BOS in front of a text."""
    folder = tmp_path_factory.mktemp("fronted")
    tokenizer = with_front(case.tokenizer("teacher"), folder / "tokenizer", ["<s>"])
    teacher = write_teacher(folder / "teacher", tokenizer, vocab_size=SMALL_TEACHER_ROWS)
    return Case(folder, case.train, case.valid, teacher)


@torch.no_grad()
def first_step(case: Case, student: Path, front: int) -> dict[str, float]:
    """From transformers' own models, row by row. front: 0 without one."""
    data, ids = AlignedDataset.open(case.train), (BOS,) * front
    rows = TrainRows(data, 64, 0, TeacherIds(data, front=Front(ids)), Front(ids))
    batches = Batches(rows, Layout(2, 4, 1), 0).step(0)
    ours, teachers = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (student, case.teacher))
    losses, guides = list[torch.Tensor](), list[float]()
    for batch in batches:
        for b in range(2):
            logits = ours(batch.input_BS[b : b + 1]).logits[0]
            losses.append(F.cross_entropy(logits, batch.target_BS[b], ignore_index=IGNORE, reduction="none"))
            read = torch.from_numpy(batch.teacher_inputs[b]).long()
            logits = teachers(read[None]).logits[0, batch.teacher_leads[b] :]
            teacher_loss_U = F.cross_entropy(logits, torch.from_numpy(batch.teacher_targets[b]).long(), reduction="none")
            spans = zip(batch.first_BS[b].tolist(), batch.last_BS[b].tolist(), strict=True)
            guides += [float(teacher_loss_U[first:last].max()) for first, last in spans if first < last]
    kept = [loss[loss > 0] for loss in losses]
    return {"loss/all_tokens": float(torch.cat(kept).mean()), "guidance/guide_kept": sum(guides) / len(guides)}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [0, 2])
def test_a_run_reads_what_both_tokenizers_put_in_front_and_says_so(fronted: Case, stages: int, tmp_path: Path) -> None:
    name = f"read-{stages}"
    overrides = [f"parallel.pipeline_stages={stages}", "training.steps=1", "training.schedule.warmup_steps=0", "guidance.keep=1"]
    still: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-12, "weight_decay": 0.0}}}
    finished = spawn(max(1, stages), fronted.command(name, overrides, still))
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "the student reads <s> (1) in front of each row, </s> (0) after each document" in finished.stdout
    assert "the teacher reads <s> (1) in front of each row" in finished.stdout
    export(fronted.out(name), tmp_path / "student")  # whose weights never moved
    with_bos, without = (first_step(fronted, tmp_path / "student", front) for front in (1, 0))
    said = next(line for line in metrics(fronted.out(name)) if "loss/train" in line)
    for number in ("loss/all_tokens", "guidance/guide_kept"):
        assert said[number] == pytest.approx(with_bos[number], abs=1e-4)
        assert said[number] != pytest.approx(without[number], abs=1e-3), "the front did not matter"


@pytest.mark.slow
def test_a_checkpoint_without_a_front_is_not_resumed_with_one(fronted: Case) -> None:
    plain = [*fronted.command("resumed", ["student.bos=none", "training.steps=2"])]
    assert spawn(1, plain).returncode == 0
    refused = spawn(1, fronted.command("resumed", ["training.steps=4"]))
    assert refused.returncode == 2
    assert "was written with student.bos = none, this run has 1: it would read other rows" in refused.stdout
    assert spawn(1, fronted.command("resumed", ["student.bos=none", "training.steps=3"])).returncode == 0


@pytest.mark.parametrize("placement", ["replicated", "cached"])
def test_a_teacher_without_a_front_reads_the_end_of_text_and_a_run_says_why(case: Case, tmp_path: Path, placement: str) -> None:
    """`before` of the stored losses is that id, too."""
    data = AlignedDataset.open(shutil.copytree(case.valid, tmp_path / "data"))
    score(data.path, ScoringOptions(case.teacher, "float32", context=64, stride=32))
    data = AlignedDataset.open(data.path)
    eos = data.teacher_tokenizer
    assert data.scoring is not None and (data.scoring.front, data.scoring.before) == ((), eos.eos_id)
    run = load_run(Path(case.command("described")[0]), [f"teacher.placement={placement}"])
    student, teacher = describe_fronts(run, data, NO_FRONT, NO_FRONT)
    assert "the student reads nothing in front of each row, " in student
    why = "because its tokenizer puts nothing in front of a text"
    assert teacher == f"the teacher reads {eos.eos_token} ({eos.eos_id}) in front of each document, {why}"
    no_teacher = run.model_copy(update={"guidance": Guidance(objective="clm")})
    assert len(list(describe_fronts(no_teacher, data, NO_FRONT, NO_FRONT))) == 1


@pytest.mark.slow
def test_cached_losses_with_another_front_than_the_run_asks_for_are_refused(fronted: Case, tmp_path: Path) -> None:
    data = shutil.copytree(fronted.valid, tmp_path / "data")
    score(data, ScoringOptions(fronted.teacher, "float32", context=64, stride=32, bos="none"))
    asked = [f"data.train={data}", "teacher.placement=cached", "training.steps=1", "training.schedule.warmup_steps=0"]
    refused = spawn(1, fronted.command("cached", asked))
    assert refused.returncode == 2
    assert "was scored with nothing in front of each window, but teacher.bos = 'auto' means <s> (1)" in refused.stdout
    taken = spawn(1, fronted.command("cached", [*asked, "teacher.bos=none"]))
    assert taken.returncode == 0, taken.stdout[-3000:]
    assert "the teacher reads </s> (0) in front of each document, because teacher.bos is 'none'\n" in taken.stdout


@pytest.mark.slow
def test_one_process_may_read_the_front_of_its_models_alone(fronted: Case) -> None:
    """A teacher's folder goes before the dataset's tokenizer, whose ids are the same."""
    finished = spawn(1, fronted.command("asked", ["teacher.bos=2", "student.bos=5", "training.steps=1"]))
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "the student reads" in finished.stdout and "(5) in front of each row" in finished.stdout
    assert re.search(r"the teacher reads \S+ \(2\) in front of each row", finished.stdout)
    refused = spawn(1, fronted.command("beyond", [f"teacher.bos={10**6}"]))
    assert refused.returncode == 2 and "teacher.bos = 1000000 is not an id of the model" in refused.stdout
    assert STUDENT["max_position_embeddings"] == 128
