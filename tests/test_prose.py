"""The patterns of `make prose` find the sentences that they were made for, and leave good English alone."""

# ruff: noqa: E501  (a sentence stands as it was)

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("prose", ROOT / ".ci" / "prose.py")
assert spec and spec.loader
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)

# a sentence that was once in the project, and its replacement
REWRITTEN = [
    (
        "On held-out text it beats chance and loses to plain training: continued, it learns better what the teacher finds easy and worse "
        "what it finds hard; from nothing, both worse. What the teacher does not know, a guided student does not learn.",
        "On held-out text, guidance beats random selection but not plain training. In continued pretraining it improves tokens the "
        "teacher finds easy and worsens the hard ones; from scratch it is worse on both. A guided student does not learn what its "
        "teacher does not know.",
    ),
    (
        "On what `make demo` left in `.demo/` (0.9 GB), the whole way is, with five steps that only show that it runs:",
        "End to end, on the files `make demo` left in `.demo/` (0.9 GB). Five training steps are enough to see it run:",
    ),
    ("Killed, the command goes on where it was", "If it is killed, run the same command again; it resumes."),
    (
        "no GPU, no compiler, no downloads but packages",
        "Needs Python 3.11+, make and a network (3.5 GB of pip packages). No GPU or compiler.",
    ),
    ("in an environment of your own, `pip install -e .` does.", "In your own environment, run `pip install -e .` instead."),
    (
        "What their sources say; docs/neighbors.md has what they learn from the teacher and how they are parallel, and which snapshots "
        "were read.",
        "Compared by reading source code, not by running it. docs/neighbors.md lists the commits, the distillation signal and the "
        "parallelism of each project.",
    ),
    ("`plan` tells memory, hours and cost of all layouts", "`plan` estimates memory, time and cost for each layout"),
    (
        "What lacks is ours: rows, counts and statistics by data-parallel rank instead of by process, and checkpoints, which hold whole "
        "tensors.",
        "The missing pieces are on our side: row assignment, counts and statistics are per process, not per data-parallel rank, and "
        "checkpoints assume unsplit tensors.",
    ),
    (
        "`--set` takes any field of the table below; of two alternatives (...) it replaces the other one.",
        "`--set` accepts any field below. Setting one of two exclusive fields (...) removes the other.",
    ),
    ("A run tells three ways what it does, with the same numbers", "A run reports the same metrics in three places"),
    (
        "TensorBoard itself begins with *Time Series*, all curves by the alphabet; the tab **Custom Scalars** has the ones that tell the story",
        "TensorBoard opens on *Time Series*, which lists all curves alphabetically. **Custom Scalars** groups the important ones.",
    ),
    (
        "A message that says `error:` and ends with exit code 2 tells what to mend; this page is for what no single message can tell.",
        "If a command prints `error:` and exits with code 2, the message says how to fix it. This page covers symptoms without such a "
        "message.",
    ),
    (
        "Longer it cannot be because the plan is a bound of each micro-batch as well, under `sequence` of each row",
        "It cannot be larger, because the planned count also bounds every micro-batch (every row under `sequence`)",
    ),
    (
        "Never run: the real benchmarks, whose data lm-eval downloads; the other harness; a GPU, so `--gpus` neither.",
        "Not tested: the real benchmarks (their data must be downloaded), the other harness, and GPUs, so `--gpus` is untested too.",
    ),
    (
        "A run that does not fit as its files have it is told so, with the largest part, both values and what to change",
        "If the configured run does not fit, the plan says so, names the largest component and suggests a change",
    ),
    ("A slice that is none.", "Invalid `--shards I/N`."),
    (
        "What one rank meets, all ranks act on: an error on one must not leave the others waiting for it.",
        "Share errors between ranks, so that one failing rank does not leave the others blocked in a collective.",
    ),
    (
        "What is no fault as far as can be known here, and may be one.",
        "Likely mistakes that cannot be proven without data.",
    ),
    (
        "Why a model that is not on this machine is looked for where it is looked for.",
        "A note for a model that is neither on disk nor in the Hub cache.",
    ),
    ("An id with its whole commit is one everywhere.", "A name with a full commit hash is always treated as a Hub id."),
    (
        "'scheduler' belongs into the run file, as [training.schedule]",
        "'scheduler' is not read here: set [training.schedule] in the run file",
    ),
    (
        "distance_weight is of 'uld' and 'kld'; objective is 'guided'",
        "distance_weight applies only to objectives 'uld' and 'kld' (objective is 'guided')",
    ),
    ("Out of memory? Fewer workers a machine need less", "Out of memory? Try fewer --workers"),
    ("finalize takes the options of its build", "pass finalize the same options as the build"),
    (
        "`disk` takes what the disk refuses: a rank that cannot write goes on gathering, as the others wait for it.",
        "`disk` collects I/O errors. A rank that cannot write still takes part in the gathers, because the others wait for it.",
    ),
]
ALSO_FOUND = [
    "evaluation after step 7 was left: the run is asked to stop",
    "it is no array of numpy",
    "score anew what was scored otherwise",
    "Files for want of which a snapshot is no model",
    "it is no matter of the user's",
    "Where it cannot, it says so.",
    "Of the last step, before clipping.",
    "It needs 2 bytes a token, and one task a GPU.",
    "The whole text lies in memory; it is read once; nobody changes it.",
    "The only door to Ray is a road of its own beside the twin.",
    "As many rows are dealt to each rank.",
]
GOOD = [
    "The file is written to the folder where the run was started.",
    "A dataset with a token on each line, a step counter and a second shard.",
    "Each rank needs a GPU and reads a row at a time.",
    "There is no GPU here, and there are no checkpoints in the folder.",
    "The loss is no longer finite, and its value is no larger than before.",
    "As many documents as there are workers are read at once.",
    "Of course, the mask is applied before the softmax.",
    "Of the two models, only the student is trained.",
    "What is the difference between `microbatch` and `global`?",
    "If `path` is None, the default is used; otherwise the file is opened.",
    "The value lies between 0 and 1, and the whole batch is used.",
    "It must be a whole number of seconds; see e.g. `training.max_minutes`.",
    "It is None of the values that you set.",
    "The gradient depends on what the scheduler returns.",
    "Compared with 4 bytes per token, half of the memory is free.",
    "The message says which field is wrong.",
    "Two processes on a machine share a folder.",
    "Indeed, the tokenizer adds a prefix to every document.",
    "After it is loaded, the model is moved to the GPU.",
]


def advice(text: str, markdown: bool = False) -> list[str]:
    return [advice for _, _, advice in prose.findings(text, markdown)]


@pytest.mark.parametrize("now, better", REWRITTEN)
def test_a_rewritten_sentence_is_found_and_its_replacement_is_not(now: str, better: str) -> None:
    assert advice(now)
    assert not advice(better)


@pytest.mark.parametrize("sentence", ALSO_FOUND)
def test_a_sentence_of_the_same_kind_is_found(sentence: str) -> None:
    assert advice(sentence)


@pytest.mark.parametrize("sentence", GOOD)
def test_good_english_gives_no_finding(sentence: str) -> None:
    assert not advice(sentence)


def test_code_is_not_prose() -> None:
    assert not advice(
        "Run it:\n\n    mend anew\n\n```\nnobody lies\n```\n\nThe option `alone` and [a link](door.md).\n"
        "\n| a | b |\n|---|---|\n| `beside` | 1 |\n\n<!-- table -->\nalone\n<!-- end of table -->\n",
        markdown=True,
    )


def test_a_finding_has_its_line() -> None:
    text = "# Title\n\nA sentence without a fault.\nA second line,\nwhich is alone.\n\n- An item.\n- Read it anew.\n\n| x | the door |\n"
    assert [(line + 1, words) for line, words, _ in prose.findings(text, markdown=True)] == [
        (5, "alone"),
        (8, "anew"),
        (10, "door"),
    ]


def test_a_line_of_markdown_has_one_sentence() -> None:
    assert advice("One sentence. Another one.", markdown=True) == ["write one sentence per line"]
    assert not advice("One sentence, e.g. This.\nAnother one.\n\n**A lead.** The rest.\n\n1. An item.\n", markdown=True)


def test_docstrings_comments_and_messages_are_read() -> None:
    code = (
        '"""What it does."""\n\nx = 1  # alone\n# a comment that\n# goes on\n'
        'raise ValueError(\n    f"{x} is no number"\n)\ny = "alone"\nz = f"""as a\ntable"""\n'
    )
    found = sorted((above + line + 1, words) for above, text in prose.passages(code) for line, words, _ in prose.findings(text))
    assert found == [(1, "What"), (3, "alone"), (5, "goes on"), (7, "is no number")]


def test_the_command_counts_its_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("Good English.\n")
    assert prose.main([str(page)]) == 0
    page.write_text("A heading\n\nIt is read anew.\n")
    assert capsys.readouterr().out == "0 findings in 1 files\n"
    assert prose.main([str(page)]) == 1
    assert capsys.readouterr().out == f"{page}:3: 'anew': again\n1 findings in 1 files\n"
