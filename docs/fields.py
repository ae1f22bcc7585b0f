"""Write the tables of run-file fields in docs/training.md from `config.py`: names, types, defaults and docstrings.

    python docs/fields.py            print the tables
    python docs/fields.py --write    put them into the page

A test checks that the page is current.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_vocagno.config import Run, Source

PAGE = Path(__file__).parent / "training.md"
BEGIN = "<!-- fields -->\n<!-- generated from megatron_vocagno/config.py: python docs/fields.py --write -->"
END = "<!-- end of fields -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/training.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


def with_tables(page: str) -> str:
    """The page with current tables between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} needs two lines:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """One table per section of the run file."""
    parts = []
    for title, text, model, place in _sections():
        rows = [_row(model, name, place) for name, field in model.model_fields.items() if not _is_section(field)]
        parts.append(f"**{title}**: {text}\n\n| field | values | default | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, str, type[BaseModel], str]]:
    """Title, description, model, and prefix of the names of its fields."""
    yield "At the top of the file", "before the first section.", Run, ""
    for name, field in Run.model_fields.items():
        if (model := _model(field.annotation)) is None:
            continue
        yield f"`[{name}]`", _text(inspect.getdoc(model) or ""), model, f"{name}."
        for inner, below in model.model_fields.items():
            if _is_section(below) and (part := _model(below.annotation)) is not None:
                yield f"`[{name}.{inner}]`", _text(inspect.getdoc(part) or ""), part, f"{name}.{inner}."


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, or of each table of a list of tables."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _is_section(field: FieldInfo) -> bool:
    # the tables of a blend are described by data.train
    return _model(field.annotation) not in (None, Source)


def _row(model: type[BaseModel], name: str, place: str) -> str:
    field = model.model_fields[name]
    default = field.default
    if default is PydanticUndefined:
        shown = "required"
    elif default is None or default == ():
        shown = ""
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{place}{name}` | {_values(field.annotation, field.metadata)} | {shown} | {_text(_docstrings(model)[name])} |\n"


def _values(annotation: Any, metadata: list[Any]) -> str:
    """The values that a field accepts, in the words of TOML."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _values(annotation.__origin__, list(annotation.__metadata__))
    if origin is tuple:
        if _model(annotation) is not None:
            return "path, or tables"
        return f"list of {_values(get_args(annotation)[0], [])}s".replace("integer > 0s", "integers > 0")
    if origin is dict:
        return "table"
    if origin is not None:
        return " or ".join(_values(each, metadata) for each in get_args(annotation) if each is not NoneType)
    word = {Path: "path", int: "integer", float: "number", bool: "`true`, `false`"}[annotation]
    limits = [item for outer in metadata for item in getattr(outer, "metadata", [outer])]
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{sign} {getattr(limit, key)}" for limit in limits for key, sign in signs.items() if hasattr(limit, key)]
    return f"{word} {', '.join(bounds)}".strip()


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field."""
    [tree] = ast.parse(inspect.getsource(model)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _text(docstring: str) -> str:
    """A docstring in one line of Markdown: paths of pages become links, and `word: ...` lines and paragraphs stay apart."""
    lines: list[str] = []
    for paragraph in docstring.split("\n\n"):
        starts_item = True
        for line in paragraph.splitlines():
            if starts_item or re.match(r"`\w+`(, `\w+`)*: |A \w+: ", line):
                lines.append(line)
            else:
                lines[-1] += f" {line}"
            starts_item = False
    linked = "<br>".join(lines)
    linked = re.sub(r"docs/(\w+\.md)(#[\w-]+)?", r"[\1](\1\2)", linked)
    return re.sub(r"\(training\.md(#[\w-]+)\)", r"(\1)", linked).replace("[training.md](#", "[below](#")


if __name__ == "__main__":
    main()
