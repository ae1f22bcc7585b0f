"""The third experiment: its problems are right, its parts share no text, its labels and scores are exact."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from examples.evidence import continued, mixture, warm_student
from examples.evidence.corpus import PARTS
from examples.evidence.problems import NAMES, TEMPLATES, THINGS, invent_problems
from examples.evidence.quiz import Quiz
from examples.evidence.running import ARMS, Options
from megatron_vocagno.run_file import load_run

CODE = "def area(width, height):\n    # of a rectangle\n    return width * height\n\nprint(area(3, 14))\n"


# ---- problems


def evaluated(text: str) -> tuple[list[int], int, int]:
    """The numbers of a problem's question, the value of its work, and the result that it states."""
    question, answer = re.fullmatch(r"(.*)\nAnswer: (.*)\.", text).groups()
    work, result = answer.split(" = ")
    left, operation, right = work.split(" ")
    value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[operation](int(left), int(right))
    if operation == "/":
        assert int(left) % int(right) == 0
    assert sorted(re.findall(r"\d+", question)) == sorted([left, right])
    return [int(left), int(right)], value, int(result)


def test_results_are_right_but_for_the_share_that_is_not_and_the_rest_of_the_text_does_not_tell():
    problems = invent_problems(600, "train", seed=3, wrong=0.3)
    assert sum(problem.wrong for problem in problems) == 180
    for problem in problems:
        _, value, result = evaluated(problem.text)
        assert (value != result) == problem.wrong and result > 0
    right = invent_problems(600, "train", seed=3)
    assert [problem.question for problem in right] == [problem.question for problem in problems]
    assert all(evaluated(problem.text)[1:] == (problem.result,) * 2 for problem in right)
    counts = Counter(problem.template for problem in problems)
    assert set(counts) == set(range(len(TEMPLATES))) and max(counts.values()) - min(counts.values()) <= 1


def story(text: str) -> str:
    """A problem without its persons and things."""
    text = re.sub("|".join(THINGS), "things", text)
    for number, name in enumerate(dict.fromkeys(re.findall("|".join(NAMES), text))):
        text = text.replace(name, f"person {number}")
    return text


def test_no_story_with_its_numbers_is_in_two_parts_but_the_numbers_are_known_from_other_stories():
    problems = {part: invent_problems(count, part, seed=0) for part, count in zip(PARTS, (200, 200, 2100), strict=True)}
    stories = {part: {story(problem.text) for problem in of_part} for part, of_part in problems.items()}
    assert {part: len(of_part) for part, of_part in stories.items()} == {"test": 24, "tune": 24, "train": 144}
    assert (
        not stories["train"] & stories["test"]
        and not stories["train"] & stories["tune"]
        and not stories["test"] & stories["tune"]
    )
    facts = {part: {problem.work for problem in of_part} for part, of_part in problems.items()}
    assert len(facts["test"] & facts["train"]) > 0.8 * len(facts["test"])


# ---- texts


def write_part(folder: Path, domain: str, part: str, texts: list[str]) -> None:
    (folder / domain).mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(i), "source": f"{part}.py", "text": text} for i, text in enumerate(texts)]
    (folder / domain / f"{part}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each text names its part."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain in mixture.DOMAINS:
        for part in PARTS:
            write_part(folder, domain, part, [f"# {domain} {part}, number {i}\n{CODE * (1 + i % 5)}" for i in range(40)])
    return folder


def test_a_set_of_texts_holds_its_own_part_alone(corpus: Path):
    met = 0
    for name in [f"train-{source}" for source in mixture.SHARES] + [
        "mixed-tune",
        "mixed-test",
        "mathematics-test",
        "software-tune",
    ]:
        part = next(part for part in PARTS if part in name)
        theirs = {story(problem.text) for other in PARTS if other != part for problem in invent_problems(100, other, seed=0)}
        documents = mixture.compose(name, corpus, divisor=20)
        for text, runs in documents:
            met += 1
            assert sum(length for _, length in runs) == len(text.encode())
            if runs[0][0] == "question":
                right = re.sub(r"\d+\.$", f"{evaluated(text)[1]}.", text)
                assert story(right) not in theirs
            else:
                assert {part} == set(re.findall("train|tune|test", text))
        assert documents == mixture.compose(name, corpus, divisor=20)
    assert met > 100


def test_held_out_text_shares_no_long_line_with_training_text_of_any_domain(tmp_path: Path):
    quoted = "this line stands in the code that is learned, and in a docstring about mathematics"
    for domain in mixture.DOMAINS:
        for part in PARTS:
            write_part(tmp_path, domain, part, [f"{domain} {part} number {i}" for i in range(10)])
    write_part(tmp_path, "code", "train", [f"print(1)\n{quoted}\nprint(2)"])
    assert len(mixture.compose("mathematics-test", tmp_path)) == 10
    write_part(tmp_path, "mathematics", "test", [quoted, "something else"])
    assert [text for text, _ in mixture.compose("mathematics-test", tmp_path)] == ["something else"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [problem.text for problem in invent_problems(200, "train", seed=5)]
    warm_student.write_tokenizer(folder, [*texts, CODE])
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def read(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids with EOS, and bytes of each token of the vocabulary: byte-level pieces have one character per byte."""
    ids = np.array([*tokenizer.encode(text).ids, tokenizer.token_to_id(warm_student.EOS)], np.int32)
    lengths = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())], np.int32)
    return ids, lengths


def test_a_problems_tokens_are_labelled_to_the_digit(tokenizer: Tokenizer):
    problems = invent_problems(300, "test", seed=1, wrong=0.3)
    met = Counter()
    for problem in problems:
        ids, lengths = read(tokenizer, problem.text)
        kinds = mixture.kinds_of(mixture.of_problem(problem), ids, lengths)
        said = {str(kind): tokenizer.decode(ids[kinds == kind].tolist()) for kind in np.unique(kinds)}
        result = "wrong" if problem.wrong else "result"
        assert said[result] == str(problem.result) and said["point"] == "." and said["question"] == problem.question
        assert len({"wrong", "result"} & set(said)) == 1 and kinds[-1] == mixture.END
        met[len(said[result])] += 1
    assert min(met[1], met[2]) > 30


# ---- scores


def test_a_quiz_read_in_padded_batches_is_each_problem_read_alone(tokenizer: Tokenizer):
    problems = invent_problems(50, "test", seed=1)
    eos = tokenizer.token_to_id(warm_student.EOS)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    student = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).eval()
    quiz = Quiz.of(problems, tokenizer, eos, read(tokenizer, "")[1])
    scores = quiz.scores(student)
    losses, right = {"work": [], "result": []}, []
    for problem in problems:
        start = tokenizer.encode(problem.question).ids
        work = tokenizer.encode(problem.question + problem.work).ids[len(start) :]
        result = tokenizer.encode(str(problem.result)).ids
        ids = torch.tensor([[eos, *start, *work, *result, *tokenizer.encode(".").ids]])
        logits = student(ids).logits[0, :-1]
        loss = cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
        losses["work"] += loss[len(start) : len(start) + len(work)]
        losses["result"] += loss[len(start) + len(work) : -1]
        right.append(torch.equal(logits.argmax(-1)[-len(result) - 1 :], ids[0, -len(result) - 1 :]))
    assert scores["work_nats"] == pytest.approx(np.mean(losses["work"]), rel=1e-5)
    assert scores["result_nats"] == pytest.approx(np.mean(losses["result"]), rel=1e-5)
    assert scores["accuracy"] == np.mean(right)


# ---- runs


def test_arms_of_a_seed_differ_in_guidance_and_teacher_alone(tmp_path: Path):
    options = Options(tmp_path)
    specs = [
        continued.spec_of("continued", continued.SETTING, arm, 1, 1e-3, options) for arm in (*continued.MAIN, *continued.VARIANTS)
    ]
    loaded = [load_run(ARMS / f"{spec.arm}.toml", spec.overrides) for spec in specs]
    rests = [run.model_copy(update={"guidance": loaded[0].guidance, "teacher": ()}) for run in loaded]
    assert all(rest == rests[0] for rest in rests) and len({run.guidance.model_dump_json() for run in loaded}) == len(loaded)
    assert all(bool(run.teacher) == run.guidance.needs_teacher for run in loaded)
    oracle = continued.spec_of("continued", continued.SETTING, "oracle", 1, 1e-3, options)
    assert [one.replace("/oracle", "/dataset") for one in oracle.overrides] == list(specs[0].overrides) != list(oracle.overrides)
    assert sum(source.weight for source in loaded[0].data.train) == 1


def test_tuning_is_judged_by_no_text_that_tables_are_made_of(tmp_path: Path):
    for spec in continued.tuning(Options(tmp_path)):
        run = load_run(ARMS / f"{spec.arm}.toml", spec.overrides)
        assert run.data.valid.parts[-2] == "mixed-tune" and spec.seed == 100
    for spec in continued.runs(Options(tmp_path, quick=True)):
        assert load_run(ARMS / f"{spec.arm}.toml", spec.overrides).data.valid.parts[-2] == "mixed-test" and spec.seed != 100
