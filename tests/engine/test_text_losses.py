"""The losses over text of both models equal those of transformers on the same rows, in every layout.

A teacher that reads wrongly is reported at the first batch.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.batch.pack import Row, TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.decoding import token_bytes
from megatron_vocagno.preprocess.score import ScoringOptions, score
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.runs import (
    REPOSITORY,
    SMALL_TEACHER_ROWS,
    SMALL_TEACHER_VOCABULARY,
    SMALL_VOCABULARY,
    STUDENT,
    Case,
    metrics,
    spawn,
    write_small_teacher,
)

pytestmark = pytest.mark.slow

ROWS = 8
NAMES = ("loss/bits_per_byte", "loss/teacher_all_tokens", "loss/teacher_bits_per_byte")
RUNS: dict[str, tuple[int, list[str], dict[str, Any]]] = {
    "plain": (1, ["checkpoint.every=1"], {}),
    "pp2-dp2-global": (4, ["parallel.pipeline_stages=2", "guidance.scope=global"], {}),
    "zero3-dp2-zero3-teacher": (2, ["teacher.placement=zero3"], {"zero_optimization": {"stage": 3}}),
}


class Means(NamedTuple):
    nats: float
    bits: float


def write_student(folder: Path) -> Path:
    """A random Llama in Hugging Face's own class."""
    keys: dict[str, Any] = dict(STUDENT)
    torch.manual_seed(3)
    config = AutoConfig.for_model(keys.pop("model_type"), vocab_size=SMALL_VOCABULARY, **keys)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="module")
def train(case: Case) -> Path:
    """Paragraphs: rows with ends and first tokens of documents in their midst."""
    return case.train


def command(case: Case, student: Path, name: str, overrides: list[str], settings: dict[str, Any] | None = None) -> list[str]:
    """Of a run that starts from the student's weights."""
    run, *rest = case.command(name, ["training.steps=2", f"student.pretrained={student}", *overrides], settings)
    text = Path(run).read_text()
    Path(run).write_text(re.sub(r"\[student\.config\]\n(\w+ = .*\n)+", "", text))
    return [run, *rest]


def started(case: Case, student: Path, name: str, processes: int, overrides: list[str], settings: dict[str, Any]) -> str:
    finished = spawn(processes, command(case, student, name, overrides, settings))
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished.stdout


def steps(case: Case, name: str) -> list[dict[str, float]]:
    return [line for line in metrics(case.out(name)) if "loss/train" in line]


# ---- by transformers


@cache
def rows_of(path: Path) -> list[Row]:
    data = AlignedDataset.open(path)
    rows = TrainRows(data, 64, 0, TeacherIds(data, 256), Front((real.MISTRAL_BOS,)))
    return [rows[k] for k in range(ROWS)]


def losses_of(model: torch.nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of the last inputs, as many as there are targets: what is read before them is not told."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(inputs).long()[None], use_cache=False).logits[0, -len(targets) :].float()
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long(), reduction="none").numpy()


def means_of(data: AlignedDataset, side: str, read: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Means:
    """read: for each row target ids, whether each starts a document, and losses. Bytes are counted in the pieces themselves."""
    info = data.student_tokenizer if side == "student" else data.teacher_tokenizer
    vocabulary = json.loads((info.path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    table = data.student_byte_lengths if side == "student" else data.teacher_byte_lengths
    pieces = token_bytes(info.path / "tokenizer.json", vocabulary, table)
    nats, tokens, size = 0.0, 0, 0
    for ids, starts, losses in read:
        for token, start, loss in zip(ids.tolist(), starts.tolist(), losses.tolist(), strict=True):
            if token != info.eos_id and not start:
                nats, tokens, size = nats + loss, tokens + 1, size + len(pieces[token])
    assert tokens > 400 and sum(starts.sum() for _, starts, _ in read) > 3
    return Means(nats / tokens, nats / np.log(2) / size)


@pytest.fixture(scope="module")
def expected(case: Case, train: Path, student: Path) -> tuple[Means, Means]:
    """Of the first step: student, teacher."""
    data, rows = AlignedDataset.open(train), rows_of(train)
    learner, guide = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, case.teacher))
    mine = [
        (row.target_ids, row.starts_document, losses_of(learner, np.append(row.lead_ids, row.input_ids), row.target_ids))
        for row in rows
    ]
    theirs = [
        (
            row.teacher_target_ids,
            row.teacher_starts_document,
            losses_of(guide, row.teacher_input_ids, row.teacher_target_ids),
        )
        for row in rows
    ]
    return means_of(data, "student", mine), means_of(data, "teacher", theirs)


def line_of(student: Means, *teachers: Means) -> str:
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {k + 1}" for k in range(len(teachers))]
    nats = ", ".join(f"{name} {means.nats:.2f}" for name, means in zip((*names, "student"), (*teachers, student), strict=True))
    *bits, last = (f"{means.bits:.2f}" for means in (*teachers, student))
    return f"first batch: {nats} nats per token, {', '.join(bits)}{' and ' if bits else ''}{last} bits per byte\n"


# ---- by the run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_of_its_first_batch_what_transformers_says(
    case: Case, student: Path, train: Path, expected: tuple[Means, Means], name: str
) -> None:
    processes, overrides, settings = RUNS[name]
    said = started(case, student, f"hearing-{name}", processes, [*overrides, f"data.train={train}"], settings)
    learner, teacher = expected
    assert said.count("\nfirst batch: ") == said.count(line_of(learner, teacher)) == 1
    first, second = steps(case, f"hearing-{name}")
    assert [first[key] for key in NAMES] == pytest.approx([learner.bits, teacher.nats, teacher.bits], rel=2e-5)
    assert second["loss/bits_per_byte"] != first["loss/bits_per_byte"]
    # both of these models are random, and the larger one is sure and wrong
    assert "warning: the teacher is hardly better than chance on the first batch: " in said
    assert "warning: the teacher (223,520 parameters, its student 59,872) is no better than its student" in said
    assert "warning: the student is hardly better than chance on the first batch: 6.9" in said


def test_a_run_that_goes_on_says_it_again_of_the_batch_that_it_goes_on_with(case: Case, student: Path) -> None:
    name = "hearing-again"
    started(case, student, name, 1, ["checkpoint.every=1"], {})
    before = steps(case, name)[1]
    shutil.rmtree(case.out(name) / "checkpoints" / "step-00000002")
    said = started(case, student, name, 1, ["checkpoint.every=1"], {})
    assert "resuming after step 1" in said
    found = re.findall(r"first batch: teacher (\S+), student \S+ nats per token, (\S+) and (\S+) bits per byte", said)
    bits = [before[f"loss/{whose}bits_per_byte"] for whose in ("teacher_", "")]
    assert found == [tuple(f"{number:.2f}" for number in (before["loss/teacher_all_tokens"], *bits))]
    assert steps(case, name)[1]["loss/teacher_all_tokens"] == before["loss/teacher_all_tokens"]


def test_without_a_teacher_the_student_is_told_alone(
    case: Case, student: Path, train: Path, expected: tuple[Means, Means]
) -> None:
    """Though rows bring guides along."""
    said = started(case, student, "hearing-student", 1, ["guidance.objective=student", f"data.train={train}"], {})
    assert line_of(expected[0]) in said and "warning: the teacher" not in said
    for line in steps(case, "hearing-student"):
        assert NAMES[0] in line and not any(name.startswith("loss/teacher") for name in line)


def test_a_teacher_whose_distributions_are_asked_is_heard_at_the_first_batch(
    case: Case, student: Path, train: Path, expected: tuple[Means, Means]
) -> None:
    overrides = ["guidance.objective=uld", "training.steps=1", f"data.train={train}"]
    said = started(case, student, "hearing-uld", 1, overrides, {})
    assert line_of(*expected) in said and "warning: the teacher is hardly better than chance" in said
    assert not any(name.startswith("loss/teacher") for line in steps(case, "hearing-uld") for name in line)


# ---- cached


def cached_means(data: AlignedDataset) -> Means:
    """Of the teacher's tokens that the rows of the first step take, from the documents' losses."""
    rows, read = TrainRows(data, 64, 0, front=Front((real.MISTRAL_BOS,))), []
    for k in range(ROWS):
        for document, start, stop in rows.pieces(k):
            spans = data.spans(document, start, stop)
            taken = slice(int(spans.first[0]) if start else 0, int(spans.last[-1]))
            starts = np.arange(int(data.teacher_lengths[document])) == 0
            read.append(tuple(all_of[taken] for all_of in (data.teacher(document), starts, data.teacher_losses(document))))
    return means_of(data, "teacher", read)


@pytest.fixture(scope="module")
def scored(case: Case, train: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AlignedDataset]:
    """The training data, scored by the teacher of the runs and by one that is less sure."""
    folder = tmp_path_factory.mktemp("scored")
    other = write_small_teacher(case, folder / "other", scale=0.3)
    for name, teacher in (("first", case.teacher), ("second", other)):
        shutil.copytree(train, folder / name)
        score(folder / name, ScoringOptions(teacher, "float32", tokens_per_batch=2000))
    return [AlignedDataset.open(folder / name) for name in ("first", "second")]


@pytest.mark.parametrize("processes", [1, 2])
def test_cached_losses_are_heard_as_they_were_scored(
    case: Case, student: Path, expected: tuple[Means, Means], scored: list[AlignedDataset], processes: int
) -> None:
    name, overrides = f"hearing-cached-{processes}", [f"data.train={scored[0].path}", "teacher.placement=cached"]
    said = started(case, student, name, processes, [*overrides, f"parallel.pipeline_stages={processes - 1 and 2}"], {})
    teacher = cached_means(scored[0])
    assert line_of(expected[0], teacher) in said
    first = steps(case, name)[0]
    assert [first[key] for key in NAMES] == pytest.approx([expected[0].bits, *teacher], rel=2e-5)
    assert "the teacher is no better than its student on the first batch: " in said and "its size is not known here" in said


def test_each_of_several_teachers_is_heard(
    case: Case, student: Path, expected: tuple[Means, Means], scored: list[AlignedDataset]
) -> None:
    first, second = scored
    teachers = f'teacher=[{{placement="cached"}}, {{placement="cached", data=["{second.path}"]}}]'
    said = started(case, student, "hearing-two", 1, [f"data.train={first.path}", teachers], {})
    one, two = map(cached_means, scored)
    assert abs(one.nats - two.nats) > 0.5 and line_of(expected[0], one, two) in said
    line = steps(case, "hearing-two")[0]
    names = [f"loss/teacher_{k}_{what}" for k in (1, 2) for what in ("all_tokens", "bits_per_byte")]
    assert [line[name] for name in names] == pytest.approx([*one, *two], rel=2e-5)
    assert "warning: teacher 1 is hardly better than chance" in said and "loss/teacher_all_tokens" not in line


# ---- a teacher that knows the text, and one that reads wrongly


def write_unigram(folder: Path, family: str, ids: np.ndarray, vocabulary: int, tokenizer: Path | None, sure: float = 1.0) -> Path:
    """A model that knows how frequent each token is, and nothing else. sure: of what it knows; 0 is a guess."""
    sizes: dict[str, Any] = {key: value for key, value in STUDENT.items() if key != "model_type"}
    sizes |= {"vocab_size": vocabulary, "num_hidden_layers": 2, "tie_word_embeddings": False, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    counts = np.bincount(ids, minlength=vocabulary) + 0.01
    with torch.no_grad():
        for parameter in model.parameters():
            # norms stay; nothing reaches the sum of the layers but the embedding, which is 1
            if parameter.ndim > 1:
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1)
        model.lm_head.weight[:, 0] = sure * torch.from_numpy(np.log(counts / counts.sum())).float()
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def knowing(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text of few words, and models of both sides that know something of it."""
    folder = tmp_path_factory.mktemp("knowing")
    words = ["the", "of", "and", "in", "to", "a", "is", "that", "for", "it", "as", "with", "on", "by"]
    texts = [" ".join(random.choices(words, k=200)) for random in map(Random, range(40))]
    data = build_dataset(folder / "train", texts, case.tokenizer("student"), case.tokenizer("teacher"))
    mine, theirs = (np.concatenate(side) for side in zip(*((d.student_ids, d.teacher_ids) for d in data), strict=True))
    rows, tokenizer = SMALL_TEACHER_ROWS, case.tokenizer("teacher")
    return {
        "train": data.path,
        "student": write_unigram(folder / "student", "llama", mine, SMALL_VOCABULARY, None),
        "teacher": write_unigram(folder / "teacher", "qwen2", theirs, rows, tokenizer),
        "doubtful": write_unigram(folder / "doubtful", "qwen2", theirs, rows, tokenizer, 0.5),
        # as if its ids were those of another tokenizer
        "shifted": write_unigram(folder / "shifted", "qwen2", (theirs + 100) % SMALL_TEACHER_VOCABULARY, rows, tokenizer),
    }


@pytest.mark.parametrize(
    ("teacher", "pretrained", "chance", "behind"),
    [
        ("teacher", False, False, False),
        ("doubtful", False, False, False),
        ("doubtful", True, False, True),
        ("shifted", False, True, True),
    ],
)
def test_a_teacher_that_reads_wrongly_is_named_and_a_good_one_is_not(
    case: Case, knowing: dict[str, Path], teacher: str, pretrained: bool, chance: bool, behind: bool
) -> None:
    name, overrides = f"knows-{teacher}-{pretrained}", [f"teacher.path={knowing[teacher]}", "training.steps=1"]
    overrides.append(f"data.train={knowing['train']}")
    if pretrained:
        said = started(case, knowing["student"], name, 1, overrides, {})
    else:
        finished = spawn(1, case.command(name, overrides))
        assert finished.returncode == 0, finished.stdout[-6000:]
        said = finished.stdout
    assert said.count("\nfirst batch: ") == 1
    assert ("warning: the teacher is hardly better than chance on the first batch: " in said) == chance
    assert (re.search(r"warning: the teacher \([\d,]+ parameters, its student [\d,]+\) is no better", said) is not None) == behind
    assert said.count("warning: the") == chance + behind
    assert said.count("docs/troubleshooting.md#") == (chance or behind)


def test_the_page_that_a_warning_names_has_the_section() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert "\n## The teacher is no better than its student, or than chance\n" in page
