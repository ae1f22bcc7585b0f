"""A run file, read: TOML and overrides -> `config.Run`.

    run = load_run(Path("examples/quickstart.toml"), ["guidance.keep=0.6"])

A file may start from another, `base = "OTHER.toml"`, and say only what differs. An unknown key is refused with the nearest name,
a value of the wrong kind with its place; both name the file or the override that says so.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_vocagno.config import Run
from megatron_vocagno.errors import RunError, looked_for, nearest


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, with those that it starts from, and lay `a.b=c` overrides over it.

    `base = "OTHER.toml"` names another run file, from this one's folder: a section here replaces those fields of the base's
    section that it names; `student.config` with a `model_type` is taken whole. All other paths count from where the command is
    run. An override's value is read as TOML (`0.6`, `true`, `[1, 2]`); what is no TOML value is taken as text, so paths need no
    quotes. Raises RunError: file missing or no TOML, unknown key, wrong value.

    >>> run = load_run(Path("examples/quickstart.toml"), ["guidance.keep=0.6"])
    >>> run.guidance.keep, run.guidance.aggregate, run.data.row_length
    (0.6, 'max', 256)
    >>> load_run(Path("examples/quickstart.toml"), ["guidance.kep=0.6"])
    Traceback (most recent call last):
    megatron_vocagno.errors.RunError: --set guidance.kep=0.6:
      no field 'guidance.kep'; did you mean 'guidance.keep'?
    """
    files = _files(path)
    fields: dict[str, Any] = {}
    for file in reversed(files):
        fields = _merged(fields, files[file])
    fields = copy.deepcopy(fields)  # the files stay as they were read, to be blamed for what is theirs
    for override in overrides:
        _lay_over(fields, override)
    try:
        return Run.model_validate(fields)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for detail in (_without_place_of_one(detail, fields) for detail in error.errors()):
            found.setdefault(_source(detail["loc"], files, overrides), []).append(f"  {_explain(detail)}")
        raise RunError("\n".join(f"{source}:\n" + "\n".join(lines) for source, lines in found.items())) from None


def _files(path: Path) -> dict[Path, dict[str, Any]]:
    """The fields of a file, of its base, of that one's base, and so on."""
    files: dict[Path, dict[str, Any]] = {}
    while True:
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            if files:
                wanted, place = f", the base of {list(files)[-1]}, from whose folder it counts", nearest(path)
            else:
                wanted, place = "", looked_for(path)
            raise RunError(f"no run file at {path}{wanted}: {error.strerror}{place}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{path} is not TOML: {error}") from None
        base = fields.pop("base", None)
        files[path] = fields
        if base is None:
            return files
        if not isinstance(base, str):
            raise RunError(f"{path}: 'base' is the path of another run file, not {base!r}")
        under = path.parent / base
        if any(under.resolve() == file.resolve() for file in files):
            raise RunError(f"{path}: base = {base!r} leads back to {under}, which starts from this file")
        path = under


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        here = (*place, name)
        other = ALTERNATIVES.get(here, "")
        if other not in over:  # a file that names both is refused, whatever its base
            merged.pop(other, None)
        below = base.get(name)
        # fields of one architecture mean nothing to another
        anew = here == ("student", "config") and isinstance(value, dict) and "model_type" in value
        merged[name] = _merged(below, value, here) if isinstance(value, dict) and isinstance(below, dict) and not anew else value
    return merged


ALTERNATIVES: dict[tuple[str, ...], str] = {
    ("student", "pretrained"): "config",
    ("student", "config"): "pretrained",
    ("training", "steps"): "tokens",
    ("training", "tokens"): "steps",
}
"""Of each two only one may stand in a run: what is laid over one takes the place of the other."""


def _lay_over(fields: dict[str, Any], override: str) -> None:
    _, equals, text = override.partition("=")
    *sections, last = place = _place(override)
    if not equals or not last:
        raise RunError(f"--set {override}: expected section.key=value")
    if not text.strip():
        # most likely a shell's variable that is not set; for a path it would mean the folder that the command is run in
        raise RunError(f"--set {override}: no value after the '='")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RunError(f"--set {override}: '{section}' is a value, not a section")
    if place in ALTERNATIVES:
        fields.pop(ALTERNATIVES[place], None)
    try:
        fields[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        fields[last] = text.strip()


def _place(override: str) -> tuple[str, ...]:
    return tuple(override.partition("=")[0].strip().split("."))


def _source(loc: Sequence[str | int], files: Mapping[Path, Mapping[str, Any]], overrides: Sequence[str]) -> str:
    """Who says what stands at a place: the command line, or the nearest file that has it.

    What concerns several fields is told of the first file, and of all overrides among these fields.
    """
    steps = tuple(map(str, loc))
    for override in reversed(overrides):
        place = _place(override)
        if steps[: len(place)] == place:
            return f"--set {override}"
    first = next(iter(files))
    if among := [f"--set {override}" for override in overrides if _place(override)[: len(steps)] == steps]:
        return f"{first} with {' '.join(among)}"
    return str(next((file for file, fields in files.items() if _has(fields, loc)), first))


def _has(value: Any, loc: Sequence[str | int]) -> bool:
    """Whether a value stands at this place, or at one that leads there."""
    for step in loc:
        if isinstance(value, Mapping):
            if step not in value:
                return False
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return not isinstance(value, list)
    return True


def _without_place_of_one(detail: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """'teacher.0.path' is 'teacher.path' for a user who wrote one table."""
    loc = tuple(detail["loc"])
    if loc[:2] == ("teacher", 0) and isinstance(fields["teacher"], Mapping):
        loc = ("teacher", *loc[2:])
    return {**detail, "loc": loc}


def _explain(detail: Mapping[str, Any]) -> str:
    """One line for one of pydantic's findings, with the nearest name where a key is unknown."""
    # of a field with two kinds of values pydantic names the kind as well: 'partition.tuple[...].0'
    place = ".".join(str(step) for step in detail["loc"] if "[" not in str(step))
    if detail["type"] == "extra_forbidden":
        *sections, key = (str(step) for step in detail["loc"])
        near = difflib.get_close_matches(key, _keys(sections), n=1, cutoff=0.5)
        return f"no field '{place}'" + (f"; did you mean '{'.'.join([*sections, near[0]])}'?" if near else "")
    if detail["type"] == "missing":
        return f"'{place}' is missing"
    message = _KINDS.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(detail["input"], dict) else f", not {detail['input']!r}"
    return f"'{place}': {message}{given}" if place else message


_KINDS = {
    "model_type": "a table expected",
    "dict_type": "a table expected",
    "tuple_type": "a list expected",
    "path_type": "a path expected",
    "int_parsing": "a whole number expected",
    "int_from_float": "a whole number expected",
    "float_parsing": "a number expected",
    "float_type": "a number expected",
}
"""Where pydantic's words speak of Python."""


def _keys(sections: Sequence[str]) -> list[str]:
    part: type[BaseModel] = Run
    for section in sections:
        if section.isdigit():  # a place in a list
            continue
        annotation = part.model_fields[section].annotation
        members = [annotation, *getattr(annotation, "__args__", ())]
        part = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return list(part.model_fields)
