"""What examples/evaluate.sh reports is what the exported student thinks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vocagno.export import export
from tests.examples.launch.test_shell import shellcheck
from tests.runs import REPOSITORY, Case, environment

SCRIPT = REPOSITORY / "examples" / "evaluate.sh"
LIMIT = 4
"""Problems that the student answers."""


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=offline, capture_output=True, text=True, check=False, timeout=600)


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Plain transformers: of the continuation's tokens, the context being tokenized with them, and the row alone in its batch."""
    first = len(tokenizer(context).input_ids)
    ids_1S = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        log_p_SV = model(input_ids=ids_1S).logits[0].log_softmax(-1)
    return sum(log_p_SV[place - 1, ids_1S[0, place]].item() for place in range(first, ids_1S.shape[1]))


@pytest.mark.long
@pytest.mark.slow
def test_results_of_a_run_are_those_of_plain_transformers_on_its_export(case: Case) -> None:
    run = case.run("evaluated", 1, ["training.steps=2", "student.config.max_position_embeddings=512", "eval.rows=2"])
    out = case.folder / "evaluated, out=1"
    tasks = "word_problems_cot,word_problems_choice,word_problems_answer"
    finished = evaluate(run, out, "--tasks", tasks, "--device", "cpu", "--limit", str(LIMIT))
    assert finished.returncode == 0, finished.stderr[-6000:]
    written = Path(finished.stdout.splitlines()[-1])
    results = json.loads(written.read_text())["results"]
    assert written.name.startswith("step-00000002_") and {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".txt"}
    assert "word_problems_choice" in (out / "step-00000002.txt").read_text()

    exported = case.folder / "evaluated-hf"
    export(run, exported)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    problems, shots = (
        [json.loads(line) for line in (REPOSITORY / "examples" / "evaluate" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("problems", "shots")
    )
    examples = "".join(f"Q: {shot['question']}\nA: The answer is {shot['answer']}\n\n" for shot in shots)
    right, nats, scores = 0, 0.0, []
    assert len(problems) == 12 and len(shots) == 3
    for problem in problems[:LIMIT]:
        context = f"{examples}Q: {problem['question']}\nA: The answer is"
        choices = {choice: log_likelihood(model, tokenizer, context, f" {choice}") for choice in problem["choices"]}
        right += max(choices, key=choices.__getitem__) == problem["answer"]
        nats -= choices[problem["answer"]]
        scores.append(list(choices.values()))
    (samples,) = out.glob("samples_word_problems_choice_*.jsonl")
    told = [[float(answer[0][0]) for answer in json.loads(line)["resps"]] for line in samples.read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(scores), rtol=1e-4, atol=1e-4)
    assert results["word_problems_choice"]["acc,none"] == pytest.approx(right / LIMIT)
    assert results["word_problems_answer"]["perplexity,none"] == pytest.approx(math.exp(nats / LIMIT), rel=1e-3)
    (samples,) = out.glob("samples_word_problems_cot_*.jsonl")
    written_by_student = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(written_by_student) == LIMIT and all(written_by_student)
    assert 0 <= results["word_problems_cot"]["exact_match,answer"] < 1, "so young a student"


class Speaker(NamedTuple):
    says: str
    scores: int


def speakers(answer: int) -> list[Speaker]:
    return [
        Speaker(f" Some reasoning with 9 and 3. The answer is {answer}.\n\n", 1),
        Speaker(f" The answer is {answer}", 1),
        Speaker(f" The answer is {answer + 1}.", 0),
        Speaker(f" The answer is {answer}0.", 0),
        Speaker(f" It is {answer}.", 0),
        Speaker(f" The answer is {answer + 1}. No. The answer is {answer}.", 0),
    ]


SPEAK = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

class Canned(LM):
    def generate_until(self, requests, **_):
        return [responses[request.doc["question"]] for request in requests]
    loglikelihood = loglikelihood_rolling = None

responses = json.load(sys.stdin)
tasks = TaskManager(include_path="examples/evaluate", include_defaults=False)
told = simple_evaluate(Canned(), tasks=["word_problems_cot"], task_manager=tasks, bootstrap_iters=0)
scores = {sample["doc"]["question"]: sample["exact_match"] for sample in told["samples"]["word_problems_cot"]}
print(json.dumps([told["results"]["word_problems_cot"]["exact_match,answer"], scores]))
"""


@pytest.mark.long
def test_an_answer_that_is_written_out_scores_where_it_is_right() -> None:
    """The task's own filter and metric, by lm-eval, on answers that nobody generated."""
    problems = [json.loads(line) for line in (REPOSITORY / "examples" / "evaluate" / "problems.jsonl").read_text().splitlines()]
    chosen = {}
    for place, problem in enumerate(problems):
        each = speakers(int(problem["answer"]))
        chosen[problem["question"]] = each[place % len(each)]
    beside = Path(sys.prefix) / "evaluation"
    offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONPATH=f"{beside}{os.pathsep}{REPOSITORY}")
    finished = subprocess.run(
        [sys.executable, "-c", SPEAK],
        cwd=REPOSITORY,
        env=offline,
        input=json.dumps({question: speaker.says for question, speaker in chosen.items()}),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    mean, scores = json.loads(finished.stdout.splitlines()[-1])
    assert scores == {question: speaker.scores for question, speaker in chosen.items()} and len(scores) == 12
    assert mean == pytest.approx(4 / 12)


def test_a_mistake_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    mistakes = {
        (): "usage: ",
        (tmp_path / "nowhere",): "there is no folder",
        (tmp_path / "empty",): "no run's output folder, and no Hugging Face folder",
        (tmp_path, "--shots", "few"): "--shots is a number of examples, not 'few'",
        (tmp_path, "--limit", "0"): "--limit is a number of problems",
        (tmp_path, "--batch-size", "8; date"): "--batch-size is a number or auto",
        (tmp_path, "--gpus", "all"): "--gpus is a number",
        (tmp_path, "--include-path", tmp_path / "nowhere"): "there is no folder",
        (tmp_path, "--limt", "3"): "no option --limt",
        (tmp_path, "--limit"): "--limit needs a value",
    }
    for arguments, expected in mistakes.items():
        finished = evaluate(*arguments)
        assert finished.returncode == 2 and finished.stderr.startswith("error: "), arguments
        assert expected in finished.stderr
    assert not (tmp_path / "evaluation").exists()


def test_help_is_the_head_of_the_script() -> None:
    head = SCRIPT.read_text().partition("\nset -")[0].splitlines()[1:]
    for arguments in (["--help"], ["-h"], ["RUN", "--limit", "3", "--help"]):
        told = evaluate(*arguments)
        assert told.returncode == 0 and not told.stderr
        assert told.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert len(head) > 5 and all(line.startswith("#") for line in head)


@pytest.mark.long
def test_a_task_that_does_not_exist_is_told_before_anything_is_exported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()  # no checkpoint in it: an export would say so
    told = evaluate(tmp_path, "--tasks", "word_problems_cot,word_problems_cto,mmlu_stem_c*")
    assert told.returncode == 2 and told.stderr.endswith(
        "error: Tasks not found: word_problems_cto\n"
        f"  These are there: PYTHONPATH='{sys.prefix}/evaluation' python -m lm_eval ls tasks "
        f"--include_path '{REPOSITORY / 'examples' / 'evaluate'}'\n"
    )
    assert "Traceback" not in told.stderr and not (tmp_path / "evaluation").exists()


def test_without_an_environment_the_script_says_which_to_activate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath"):
        (tools / name).symlink_to(shutil.which(name) or name)
    finished = subprocess.run([str(SCRIPT), str(tmp_path)], env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: there is no python: activate ") and ".venv/bin/activate" in finished.stderr


def test_without_the_harness_the_script_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')  # sees the standard library alone
    python.chmod(0o755)
    command = [str(SCRIPT), str(tmp_path)]
    bare = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    finished = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "is not installed" in finished.stderr and "requirements/evaluation.txt" in finished.stderr


def test_the_script_is_clean_for_shellcheck_and_can_be_called() -> None:
    assert shellcheck(SCRIPT) == ""
    assert os.access(SCRIPT, os.X_OK)
