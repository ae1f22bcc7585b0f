"""Real text from installed packages, by domain, in parts that share no file, no text and no long line.

    write_corpus(Path(".evidence/corpus"), ["mathematics"])
    read_part(Path(".evidence/corpus"), "mathematics", "train")

Files: FOLDER/DOMAIN/PART.jsonl, one {"id", "source", "text"} per line. No package is imported or run. The same versions of the
packages and of Python give the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import orjson

from examples.demo.corpus import DOCUMENTED, SHORTEST, Text, champ_problems, docstrings
from megatron_vocagno.files import write_durably

Domain = Literal["mathematics", "software", "code"]
Part = Literal["test", "tune", "train"]
"""test: for the tables. tune: for choosing learning rates."""
PARTS: tuple[Part, ...] = get_args(Part)
HELD_OUT = 20
"""One source file in this many is for tests, and another one is for tuning."""
LONG_LINE = 60
"""Characters. A line this long is a sentence of one file. Shorter lines are headings and idioms that many files share."""


def mathematics() -> Iterator[Text]:
    """Worked problems, and docstrings of mathematical packages."""
    return chain(champ_problems(), *(docstrings(package) for package in DOCUMENTED))


def software() -> Iterator[Text]:
    """Python's reference manual, and docstrings about arrays, models and clusters."""
    return chain(manual(), *(docstrings(package) for package in ("numpy", "transformers", "ray")))


def manual() -> Iterator[Text]:
    """The reference manual by topic, as `help` shows it."""
    for title, text in _dictionary(Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py", "topics").items():
        if len(text) >= SHORTEST:
            yield Text(title, f"manual/{title}", text)


def code() -> Iterator[Text]:
    """The modules of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"} & set(name.parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            if len(text) >= SHORTEST:
                yield Text(str(name), f"code/{name}", text)


SOURCES: dict[Domain, Callable[[], Iterator[Text]]] = {
    "mathematics": mathematics,
    "software": software,
    "code": code,
}


def write_corpus(folder: Path, domains: Iterable[Domain] = tuple(SOURCES)) -> None:
    """Write domains in parts. Existing domains are left as they are."""
    for domain in domains:
        place = folder / domain
        if (place / "train.jsonl").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        for part, texts in split(SOURCES[domain]()).items():  # train comes last: if it exists, the domain is complete
            lines = b"".join(orjson.dumps(text._asdict(), option=orjson.OPT_APPEND_NEWLINE) for text in texts)
            write_durably(place / f"{part}.jsonl", lines)


def read_part(folder: Path, domain: Domain, part: Part) -> list[Text]:
    """The texts that `write_corpus` wrote, in the same order."""
    with (folder / domain / f"{part}.jsonl").open("rb") as file:
        return [Text(**orjson.loads(line)) for line in file]


def split(texts: Iterable[Text]) -> dict[Part, list[Text]]:
    """Split by source file, in NFC, each text once. If two texts share a long line, test keeps its text, then tune."""
    by_part: dict[Part, dict[str, Text]] = {part: {} for part in PARTS}
    for text in texts:
        normal = unicodedata.normalize("NFC", text.text)
        by_part[part_of(text.source)].setdefault(normal, text._replace(text=normal))
    taken: set[str] = set()
    parts: dict[Part, list[Text]] = {}
    for part in PARTS:
        parts[part] = [text for text in by_part[part].values() if text.text not in taken and not taken & long_lines(text.text)]
        taken |= {text.text for text in parts[part]}.union(*(long_lines(text.text) for text in parts[part]))
    return parts


def part_of(source: str) -> Part:
    """The part of a file depends only on its name, so a new file moves no other."""
    slot = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % HELD_OUT
    return PARTS[min(slot, 2)]


def long_lines(text: str) -> set[str]:
    return {line for part in text.splitlines() if len(line := part.strip()) >= LONG_LINE}


def _dictionary(file: Path, name: str) -> dict[str, str]:
    """The literal dictionary that a module assigns to a name."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and target.id == name and node.value:
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise SystemExit(f"error: {file} assigns no dictionary to {name!r}")
