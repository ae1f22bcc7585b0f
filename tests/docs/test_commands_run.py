"""Every command that README, docs, examples, docstrings and heads of scripts show is executed: `registry.py` says how."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vocagno.export import export
from tests.datasets import build_dataset
from tests.docs.commands import Command, of_docstring, of_head, of_page, shown_commands
from tests.docs.execution import execute, furnish, parse, texts_of_documents
from tests.docs.registry import RULES, Checked, Here, There, replaced, rule_of
from tests.runs import REPOSITORY, Case
from tests.tokenizers_for_tests import mistral_tokenizer_path, multilingual_texts

COMMANDS = shown_commands()
RULED = [(command, rule) for command in COMMANDS if (rule := rule_of(command)) is not None]
PAGES = sorted({command.file for command, rule in RULED if isinstance(rule.how, Here)})
CHECKED = list(dict.fromkeys((command.text, rule.how) for command, rule in RULED if isinstance(rule.how, Checked)))
THERE = list(dict.fromkeys((command.text, rule.how) for command, rule in RULED if isinstance(rule.how, There)))


@pytest.fixture(scope="session")
def furnished(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new folder with everything that commands name."""
    overrides = ["training.steps=1", "logging.samples=2", "eval.rows=4", "student.config.max_position_embeddings=512"]
    run = case.run("documented", 1, overrides)
    student = case.folder / "documented-hf"
    export(run, student)
    dataset = build_dataset(case.folder / "documented-data", texts_of_documents()[:40], student, case.teacher).path

    def new() -> Path:
        folder = tmp_path_factory.mktemp("page")
        furnish(folder, case, run, student, dataset)
        return folder

    return new


def test_every_command_has_a_rule() -> None:
    assert len(COMMANDS) > 100
    unknown = [str(command) for command in COMMANDS if rule_of(command) is None]
    told = "tests/docs/registry.py says nothing of these; its first lines tell how to add them:\n" + "\n".join(unknown)
    assert not unknown, told


def test_every_rule_has_a_command() -> None:
    used = [rule for _, rule in RULED]
    unused = [rule.pattern for rule in RULES if rule not in used]
    assert not unused, "no command is left for these rows of tests/docs/registry.py; remove them:\n" + "\n".join(unused)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_the_page_shows_them(page: str, furnished: Callable[[], Path]) -> None:
    """From the page's first to its last, in one folder; and what stands beneath them is what they print."""
    folder, ran = furnished(), 0
    for command, rule in RULED:
        if command.file == page and isinstance(rule.how, Here):
            printed = execute(replaced(command.text, rule.how.small), folder)
            if " [" in command.text:
                parse(command.text)
            missing = [line for line in shown_output(command) if line not in printed.splitlines()]
            assert not missing, f"{command}\nprints no such line:\n" + "\n".join(missing)
            ran += 1
    assert ran


def shown_output(command: Command) -> list[str]:
    """Of tokens beneath tokens, whose bytes are those of the tokenizers, on every machine."""
    return [line for line in command.output if re.match(r"(student|teacher) +\d", line)]


@pytest.mark.slow
def test_the_alignment_on_the_page_is_the_one_that_is_printed(teacher_tokenizer: Path, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "preprocessing.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?m)^    ((?:student|teacher) .*⟦T⟧.*)$", page)
    [french] = [text for text in multilingual_texts() if text.startswith("Tous les")]
    build_dataset(tmp_path / "french", [french], mistral_tokenizer_path(), teacher_tokenizer)
    printed = execute("python -m tools.preprocess.show_document french/dataset 0", tmp_path)
    assert len(shown) == 2 and all(any(line.startswith(each) for line in printed.splitlines()) for each in shown), printed


@pytest.mark.parametrize(("text", "how"), CHECKED, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_what_cannot_run_here_is_understood(text: str, how: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert how.why
    how.check(replaced(text, how.given))


@pytest.mark.parametrize(("text", "how"), THERE, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_what_runs_elsewhere_is_there(text: str, how: There) -> None:
    name, _, function = how.by.partition("::")
    source = (REPOSITORY / name).read_text(encoding="utf-8")
    if function:
        assert function in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}, how.by
    if how.script:
        path = Path(how.script)
        assert any(part in source for part in (path.name, path.stem, path.parent.name)), f"{name} does not run {path}"
        source += (REPOSITORY / how.script).read_text(encoding="utf-8")
    assert how.words
    for word in how.words:
        assert word in text and word in source, f"{word!r} of {text!r} is not in {how.by}"


def test_commands_are_found_wherever_they_stand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `make demo`, not `make`.\n\n    make one \\\n        two   # why\n\n```\n$ make three\nmake is its output\n```\n"
        "```bash\nA=1 odd words    a column of its own\n# make four\n```\n```python\nmake = 5\n```\nmake six\n",
        encoding="utf-8",
    )
    found = of_page(page, tmp_path)
    assert [(command.line, command.text) for command in found] == [
        (1, "make demo"),
        (3, "make one two"),
        (7, "make three"),
        (11, "A=1 odd words"),
    ]
    assert found[2].output == ("make is its output",)
    module = tmp_path / "module.py"
    module.write_text('"""What it does.\n\n    make demo     with a reason\n\nSee `make test`.\n"""\n\nX = "make three"\n')
    assert [(command.line, command.text) for command in of_docstring(module, tmp_path)] == [(3, "make demo"), (5, "make test")]
    head = tmp_path / "job.sh"
    head.write_text("#!/bin/sh\n# Why.\n#\n#   make demo\n\n# make test\n")
    assert [(command.line, command.text) for command in of_head(head, tmp_path)] == [(4, "make demo")]
