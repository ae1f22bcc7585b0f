"""The commands that the documentation shows: found in pages, in docstrings, and in the heads of scripts and run files.

A command is a line whose first word is a program of PROGRAMS, or a script. In pages it stands in a fenced or indented block, or
between backticks. Continued lines are joined; comments, explanations after two spaces and the prompt are taken off.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.runs import REPOSITORY

PROGRAMS = ["python", "torchrun", "deepspeed", "accelerate", "tensorboard", "make", "pip", "source", "sbatch", "srun", "scancel"]
PROGRAMS += ["kubectl", "docker", "ray", "hf", "aws", "curl", "git", "ssh", "pdsh", "pytest", "mkdocs"]
# the names that pages use for short, once the whole command has been shown
SHORT = ["build_dataset", "score_teacher", "show_document", "node.sh", "run_forever.sh", "evaluate.sh"]
# evidence.md is written by a command, log.md tells what was done
NOT_PAGES = ("docs/log.md", "docs/evidence.md")
SHELLS = ("bash", "sh", "console", "shell")

_ASSIGNMENTS = r"(?:[A-Z][A-Z0-9_]*=\S+ +)*"
_PROGRAM = rf"(?:{'|'.join(map(re.escape, PROGRAMS + SHORT))}|(?:\./|examples/)[\w./-]*\.sh)"
_COMMAND = re.compile(rf"(?!python -m$)(?:{_ASSIGNMENTS}{_PROGRAM} \S|\w+=\$\({_PROGRAM} |… --\w|\.ci/[a-z]+$)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Command:
    """file: from the repository's root. output: what the page shows beneath it, where it is a block."""

    file: str
    line: int
    text: str
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def shown_commands(root: Path = REPOSITORY) -> list[Command]:
    """All of them, in the order of files and lines."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md")), *sorted((root / "examples").rglob("README.md"))]
    pages.append(root / "CONTRIBUTING.md")
    found = [command for page in pages if _name(page, root) not in NOT_PAGES for command in of_page(page, root)]
    for folder in ("megatron_vocagno", "tools", "examples", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            found += of_docstring(path, root)
    scripts = [path for path in sorted((root / "examples").rglob("*")) if path.suffix in (".sh", ".sbatch", ".toml", ".yaml")]
    for path in [root / "Makefile", *scripts]:
        found += of_head(path, root)
    return found


def of_page(path: Path, root: Path = REPOSITORY) -> list[Command]:
    """Of a Markdown file: its blocks first, then what stands between backticks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found, prose = [], dict(enumerate(lines, 1))
    for language, block in _blocks(lines):
        if language in ("", *SHELLS):
            found += _of_block(_name(path, root), block, every_line=language in SHELLS)
        for number, _ in block:
            del prose[number]
    for number, line in prose.items():
        found += [Command(_name(path, root), number, text) for text in _INLINE.findall(line) if _COMMAND.match(text)]
    return sorted(found, key=lambda command: command.line)


def of_docstring(path: Path, root: Path = REPOSITORY) -> list[Command]:
    """Of a module: what is indented in its docstring, the docstring's first line, and what stands between backticks."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    if not isinstance(docstring := ast.get_docstring(module, clean=False), str):
        return []
    start = module.body[0].lineno
    lines = [(start + i, line) for i, line in enumerate(docstring.splitlines())]
    found = _of_block(_name(path, root), [(n, line.strip()) for n, line in lines if n == start or line.startswith("    ")])
    for number, line in lines:
        found += [Command(_name(path, root), number, text) for text in _INLINE.findall(line) if _COMMAND.match(text)]
    return found


def of_head(path: Path, root: Path = REPOSITORY) -> list[Command]:
    """Of a script or run file: the lines of its first comment, without their sign."""
    head = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("#"):
            break
        head.append((number, line.removeprefix("#").strip()))
    return _of_block(_name(path, root), head)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Fenced blocks with their language, fences included, and indented ones; each line with its number."""
    fence, block = None, list[tuple[int, str]]()
    for number, line in enumerate([*lines, ""], 1):
        if fence is None and (opened := re.match(r" *```(\w*)", line)):
            if block:
                yield "", block
            fence, block = opened[1], [(number, "")]
        elif fence is not None:
            block.append((number, "" if line.strip() == "```" else line))
            if line.strip() == "```":
                yield fence, block
                fence, block = None, []
        elif line.startswith("    ") and (block or number == 1 or not lines[number - 2].strip()):
            block.append((number, line))
        elif block and line.strip():
            yield "", block
            block = []
    if block:
        yield "", block


def _of_block(file: str, block: list[tuple[int, str]], every_line: bool = False) -> list[Command]:
    """every_line: a shell's, where each line is a command, unless a prompt tells commands from output."""
    found: list[Command] = []
    prompted = any(line.strip().startswith("$ ") for _, line in block)
    lines = iter(block)
    for number, line in lines:
        text = line.strip()
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + _without_comment(next(lines, (0, ""))[1].strip())
        text = _without_comment(text)
        is_command = text.startswith("$ ") if prompted else bool(_COMMAND.match(text)) or every_line
        if is_command and text:
            found.append(Command(file, number, text.removeprefix("$ ")))
        elif found and text:
            found[-1] = Command(file, found[-1].line, found[-1].text, (*found[-1].output, line.rstrip()))
    return found


def _without_comment(text: str) -> str:
    """Without `# reasons` and without an explanation in a column of its own."""
    return "" if text.startswith("#") else re.sub(r"(\s+# .*|(?<=\S)\s{2,}.*)$", "", text)
