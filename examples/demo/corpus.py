"""Real text out of installed packages: worked mathematics problems and the documentation in Python sources.

    python examples/demo/corpus.py --out .demo/corpus

Writes train.jsonl and heldout.jsonl, one {"id", "source", "text"} a line. Nothing is imported or run: problems are read from
JSON, docstrings from the syntax tree. A text stands in the corpus once, and one source file is never in both parts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.errors import UserError
from megatron_vocagno.files import beside

DOCUMENTED = ("sympy", "networkx", "mpmath")
"""Packages with long docstrings about mathematics; all three under BSD licenses."""
SHORTEST = 200
"""Characters; shorter docstrings often only repeat their function's name."""
HELD_OUT = 20
"""One of this number of source files is held out."""


class PackageMissing(UserError):
    """A package whose docstrings are the corpus is not installed."""


class Text(NamedTuple):
    id: str
    source: str
    text: str


def champ_problems() -> Iterator[Text]:
    """270 competition problems with their solutions, step by step (CHAMP, MIT license)."""
    problems = orjson.loads((_package("champ_dataset") / "dataset_files" / "v0.json").read_bytes())["problems"]
    for name, problem in problems.items():
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        yield Text(name, f"champ/{name}", "\n".join([problem["_text"], *steps]))


def docstrings(package: str) -> Iterator[Text]:
    """The docstrings of a package's modules, classes and functions, indentation removed."""
    root = _package(package)
    for file in sorted(root.rglob("*.py")):
        source = f"{package}/{file.relative_to(root)}"
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                if len(text) >= SHORTEST:
                    yield Text(f"{source}:{getattr(node, 'lineno', 1)}", source, text)


def write_corpus(out: Path) -> dict[str, tuple[int, int]]:
    """Write both parts; for each its documents and bytes of text."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    counts = {"train": [0, 0], "heldout": [0, 0]}
    temporary = {part: beside(out / f"{part}.jsonl") for part in counts}
    files = {part: path.open("wb") for part, path in temporary.items()}
    for stream in (champ_problems(), *(docstrings(package) for package in DOCUMENTED)):
        for text in stream:
            if text.text in seen:
                continue
            seen.add(text.text)
            held_out = int.from_bytes(hashlib.sha256(text.source.encode()).digest()[:4], "big") % HELD_OUT == 0
            part = "heldout" if held_out else "train"
            files[part].write(orjson.dumps(text._asdict(), option=orjson.OPT_APPEND_NEWLINE))
            counts[part][0] += 1
            counts[part][1] += len(text.text.encode())
    for part, file in files.items():
        file.close()
        temporary[part].replace(out / f"{part}.jsonl")
    return {part: (documents, size) for part, (documents, size) in counts.items()}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise PackageMissing(f"the package {name!r} is not installed; `make demo` installs what the demo needs")
    return Path(spec.origin).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(
        "python examples/demo/corpus.py",
        "--out DIR",
        "Write a small corpus of real text, from installed packages: train.jsonl and heldout.jsonl, 7 MB.",
        "python examples/demo/corpus.py --out .demo/corpus",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two files (required)")
    options = parser.parse_args(arguments)
    return run_command(lambda: write_and_tell(options.out))


def write_and_tell(out: Path) -> None:
    for part, (documents, size) in write_corpus(out).items():
        print(f"{part}: {documents:,} documents, {size / 1e6:.2f} MB of text")


if __name__ == "__main__":
    sys.exit(main())
