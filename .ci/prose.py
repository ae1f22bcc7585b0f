"""Check the English of Markdown, docstrings, comments and messages against the patterns of prose.toml.

.ci/prose.py [FILE ...]        .md and .py files; default: those that git tracks. Exits with 1 if there are findings
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RULES = [(re.compile(rule["pattern"], re.IGNORECASE), rule["advice"]) for rule in TABLE["rule"]]
NOT_PROSE = [(re.compile(rule["pattern"], re.DOTALL | re.MULTILINE), rule["instead"]) for rule in TABLE["not_prose"]]
MARKER = re.compile(r"\s*(?:>\s?)*((?:[-*+]|\d+\.|#+(?: \d+\.)?|!!!.*|\[\^\w+\]:)(?:\s+|$)|(?=[\w, ]+? {2,}\S))?")
ABBREVIATED = "".join(rf"(?<!\b{word})" for word in (r"e\.g", r"i\.e", "vs", "etc", "cf", "al", "[A-Z]"))
END = re.compile(ABBREVIATED + r"""[.!?]['"”)*_]*\s+(?=['"“(\[*_`]*[A-Z`{])""")
BOLD_LEAD = re.compile(r"\*\*[^*]+[.:?!]\*\*\s+")


def blocks(text: str) -> Iterator[tuple[int, str, bool]]:
    """Paragraphs, list items, headings and cells of tables: the number of lines before it, the text, whether it is a cell."""
    for pattern, instead in NOT_PROSE:
        text = pattern.sub(lambda found, instead=instead: instead + "\n" * found[0].count("\n"), text)  # type: ignore[misc]
    first, lines, heading = 0, list[str](), False
    for number, line in enumerate([*text.split("\n"), ""]):
        marker = re.match(MARKER, line)
        cells = line.strip().startswith("|")
        if lines and (cells or heading or not line.strip() or (marker and marker[1] is not None)):
            yield first, "\n".join(lines), False
            lines = []
        if cells:
            yield from ((number, cell.strip(), True) for cell in line.strip().strip("|").split("|"))
        elif line.strip():
            first, heading = first if lines else number, line.startswith("#")
            lines.append(MARKER.sub("", line, count=1).rstrip())


def findings(text: str, markdown: bool = False) -> Iterator[tuple[int, str, str]]:
    """The number of lines before it, the words and the advice of each finding."""
    for first, block, cell in blocks(text):
        ends = list(END.finditer(block))
        for start, stop in pairwise([0, *(end.end() for end in ends), len(block)]):
            for pattern, advice in RULES:
                for found in pattern.finditer(block[start:stop].replace("\n", " ").rstrip()):
                    yield first + block.count("\n", 0, start + found.start()), found[0].strip(), advice
        lead = BOLD_LEAD.match(block)
        for end in ends if markdown and not cell else []:
            if "\n" not in end[0] and (not lead or lead.end() != end.end()):
                yield first + block.count("\n", 0, end.start()), block[: end.end()][-30:].strip(), "write one sentence per line"


def passages(code: str) -> Iterator[tuple[int, str]]:
    """Docstrings, comments and other strings of at least three words, each after the number of lines before it."""
    nodes = list(ast.walk(ast.parse(code)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield node.lineno - 1, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and id(node) not in parts and len(str(node.value).split()) >= 3:
            yield node.lineno - 1, inspect.cleandoc(str(node.value))
    comments = [""] * (code.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = ("" if token.line.strip() == token.string else "- ") + token.string.lstrip("#! ")
    yield 0, "\n".join(comments)


def main(files: list[str]) -> int:
    if not files:
        listed = subprocess.run(["git", "ls-files", *TABLE["files"]], capture_output=True, text=True, check=True)
        files = [file for file in listed.stdout.splitlines() if Path(file).is_file() and file not in TABLE["skip"]]
    if wrong := [file for file in files if not file.endswith((".md", ".py")) or not Path(file).is_file()]:
        sys.exit(f"error: not a .md or .py file: {', '.join(wrong)}")
    lines = list[str]()
    for file in files:
        text, markdown = Path(file).read_text(encoding="utf-8"), file.endswith(".md")
        for above, part in [(0, text)] if markdown else passages(text):
            found = sorted(findings(part, markdown))
            lines += [f"{file}:{above + line + 1}: {words!r}: {advice}" for line, words, advice in found]
    print("".join(f"{line}\n" for line in lines) + f"{len(lines)} findings in {len(files)} files")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
