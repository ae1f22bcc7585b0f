"""Read a run file: TOML and overrides -> `config.Run`.

    run = load_run(Path("examples/quickstart.toml"), ["guidance.keep=0.6"])

A file may start from another one, `base = "OTHER.toml"`, and contain only the differences. An error for an unknown key suggests
the nearest name. Every error names the file or the override that it comes from.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_vocagno.compat import tomllib
from megatron_vocagno.config import Run
from megatron_vocagno.errors import RunError, missing_path_hint, nearest

RENAMED: dict[tuple[str, ...], str] = {
    ("teacher", "weights"): "quantization",
    ("training", "schedule", "final"): "min_lr_ratio",
    ("checkpoint", "keep"): "keep_last",
    ("guidance", "chunks"): "equal_parts",
}
"""Place of each field's old name, and its name now. Old names are accepted for one release."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file with its bases, and apply overrides `a.b=c`.

    `base = "OTHER.toml"` is a path relative to this file's folder. A section replaces only those fields of the base's section
    that it has, except that a `student.config` with a `model_type` replaces the base's `student.config` completely. All other
    paths are relative to the working directory.

    The value of an override is parsed as TOML, for example `0.6`, `true` or `[1, 2]`. If it is not valid TOML, it is taken as
    text, so paths need no quotes.

    Raises RunError: a missing file, invalid TOML, an unknown key, or a wrong value.

    >>> run = load_run(Path("examples/quickstart.toml"), ["guidance.keep=0.6"])
    >>> run.guidance.keep, run.guidance.aggregate, run.data.row_length
    (0.6, 'max', 256)
    >>> load_run(Path("examples/quickstart.toml"), ["guidance.kep=0.6"])
    Traceback (most recent call last):
    megatron_vocagno.errors.RunError: --set guidance.kep=0.6:
      no field 'guidance.kep'; did you mean 'guidance.keep'?
    """
    files = _files(path)
    notes = [f"note: {file}: {renaming(place)}" for file, (_, old) in files.items() for place in old]
    tables = {file: fields for file, (fields, _) in files.items()}
    fields: dict[str, Any] = {}
    for file in reversed(tables):
        fields = _merged(fields, tables[file])
    fields = copy.deepcopy(fields)  # errors are attributed to the files as they were read
    for override in overrides:
        notes += [f"note: --set {override}: {renaming(place)}" for place in _apply(fields, override)]
    _check_one_name(overrides)
    try:
        return Run.model_validate(fields, context=notes)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        details = [detail for detail in error.errors() if not _follows(detail, error.errors())]
        for detail in (_without_index_of_one(detail, fields) for detail in details):
            found.setdefault(_source(detail["loc"], tables, overrides), []).append(f"  {_explain(detail)}")
        raise RunError("\n".join(f"{source}:\n" + "\n".join(lines) for source, lines in found.items())) from None


Old = list[tuple[str, ...]]
"""Places of fields that were given under an old name."""


def _files(path: Path) -> dict[Path, tuple[dict[str, Any], Old]]:
    """The fields of a file, of its base, of the base's base, and so on. Old names are replaced."""
    files: dict[Path, tuple[dict[str, Any], Old]] = {}
    while True:
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            if files:
                wanted, place = f" (base of {list(files)[-1]}, relative to its folder)", nearest(path)
            else:
                wanted, place = "", missing_path_hint(path)
            raise RunError(f"no run file at {path}{wanted}: {error.strerror}{place}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{path} is not valid TOML: {error}") from None
        base = fields.pop("base", None)
        try:
            files[path] = with_current_names(fields)
        except ValueError as error:
            raise RunError(f"{path}:\n  {error}") from None
        if base is None:
            return files
        if not isinstance(base, str):
            raise RunError(f"{path}: 'base' must be the path of another run file, not {base!r}")
        under = path.parent / base
        if any(under.resolve() == file.resolve() for file in files):
            raise RunError(f"{path}: base = {base!r} is a cycle: {under} starts from this file")
        path = under


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        here = (*place, name)
        other = ALTERNATIVES.get(here, "")
        if other not in over:  # a file with both is rejected, whatever its base has
            merged.pop(other, None)
        below = base.get(name)
        # fields of one architecture have no meaning in another one
        whole = here == ("student", "config") and isinstance(value, dict) and "model_type" in value
        merged[name] = _merged(below, value, here) if isinstance(value, dict) and isinstance(below, dict) and not whole else value
    return merged


ALTERNATIVES: dict[tuple[str, ...], str] = {
    ("student", "pretrained"): "config",
    ("student", "config"): "pretrained",
    ("training", "steps"): "tokens",
    ("training", "tokens"): "steps",
}
"""Pairs of fields of which a run has exactly one. An override or a file that sets one removes the other of its base."""


def _apply(fields: dict[str, Any], override: str) -> Old:
    """Set one field. Returns the old names that the override uses."""
    _, equals, text = override.partition("=")
    *sections, last = place = _place(override)
    if not equals or not last:
        raise RunError(f"--set {override}: expected section.key=value")
    if not text.strip():
        # most likely an unset shell variable; as a path, it would mean the working directory
        raise RunError(f"--set {override}: the value after '=' is empty")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in reversed(_parts(override)):
        value = {section: value}
    try:
        value, old = with_current_names(value)
    except ValueError as error:
        raise RunError(f"--set {override}: {error}") from None
    for section in sections:
        fields, value = fields.setdefault(section, {}), value[section]
        if not isinstance(fields, dict):
            raise RunError(f"--set {override}: '{section}' is a value, not a section")
    if place in ALTERNATIVES:
        fields.pop(ALTERNATIVES[place], None)
    fields[last] = value[last]
    return old


def _check_one_name(overrides: Sequence[str]) -> None:
    """Raises RunError: two overrides set one field under its old and its new name."""
    first: dict[tuple[str, ...], str] = {}
    for override in overrides:
        other = first.setdefault(_place(override), override)
        if _parts(other) != _parts(override):
            raise RunError(f"--set {other} --set {override}: both set '{'.'.join(_place(override))}': give only one of them")


def _parts(override: str) -> tuple[str, ...]:
    """The place of an override's field, as it was written."""
    return tuple(override.partition("=")[0].strip().split("."))


def _place(override: str) -> tuple[str, ...]:
    """The place of an override's field, under its current name."""
    *sections, _ = parts = _parts(override)
    return (*sections, RENAMED[parts]) if parts in RENAMED else parts


def _source(loc: Sequence[str | int], files: Mapping[Path, Mapping[str, Any]], overrides: Sequence[str]) -> str:
    """The source of the value at a place: an override, or the nearest file that has it.

    An error about several fields is attributed to the first file, together with all overrides of these fields.
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
    """Whether there is a value at this place, or at a place above it."""
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


def _follows(detail: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a list is too short only because pydantic has left out its wrong items, which have their own errors."""
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(other["loc"][: len(loc)] == loc != other["loc"] for other in others)


def _without_index_of_one(detail: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The place of an error without the index of a single teacher: 'teacher.path' instead of 'teacher.0.path'."""
    loc = tuple(detail["loc"])
    if loc[:2] == ("teacher", 0) and isinstance(fields["teacher"], Mapping):
        loc = ("teacher", *loc[2:])
    return {**detail, "loc": loc}


def _explain(detail: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors. If a key is unknown, it suggests the nearest name."""
    # for a field with two types of values, pydantic adds the type to the place: 'partition.tuple[...].0'
    place = ".".join(str(step) for step in detail["loc"] if "[" not in str(step))
    if detail["type"] == "extra_forbidden":
        *sections, key = (str(step) for step in detail["loc"])
        near = difflib.get_close_matches(key, _keys(sections), n=1, cutoff=0.5)
        if key in _OF_DEEPSPEED:
            return (
                f"no field '{place}': the optimizer, the learning rate and the batch sizes are set in the DeepSpeed configuration"
            )
        meant = (not sections and _in_a_section(key)) or ".".join([*sections, *near] if near else [])
        return f"no field '{place}'" + (f"; did you mean '{meant}'?" if meant else "")
    if detail["type"] == "missing":
        return f"'{place}' is missing"
    blend = place.startswith("data.train")
    if detail["type"] in ("model_type", "tuple_type") and not blend and (section := _section(detail["loc"])) is not None:
        return f"'{place}' is a section, not a value: set its fields, for example {place}.{next(iter(section.model_fields))}"
    kind = _KINDS.get(detail["type"])
    message = kind.format(**detail.get("ctx", {})) if kind else str(detail["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(detail["input"], dict) else f", not {detail['input']!r}"
    hint = (
        ". For several datasets, write one [[data.train]] table per dataset" if blend and detail["type"] == "model_type" else ""
    )
    return f"'{place}': {message}{given}{hint}" if place else message


_KINDS = {
    "model_type": "expected a table",
    "dict_type": "expected a table",
    "tuple_type": "expected a list",
    "path_type": "expected a path",
    "int_parsing": "expected an integer",
    "int_from_float": "expected an integer",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "literal_error": "must be one of {expected}",
}
"""Messages in the words of TOML, instead of pydantic's in the words of Python."""


_OF_DEEPSPEED = {"lr", "learning_rate", "optimizer", "weight_decay", "batch_size", "train_batch_size", "micro_batch_size"}


def _keys(sections: Sequence[str]) -> list[str]:
    part = _section(sections)
    return list(part.model_fields) if part is not None else []


def _section(place: Sequence[str | int]) -> type[BaseModel] | None:
    """The class of the section at a place; None if there is no section."""
    part: type[BaseModel] | None = Run
    for name in map(str, place):
        if name.isdigit():  # an index in a list
            continue
        if part is None or name not in part.model_fields:
            return None
        annotation = part.model_fields[name].annotation
        members = [annotation, *getattr(annotation, "__args__", ())]
        part = next((member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), None)
    return part


def _in_a_section(key: str) -> str:
    """The place of the only field of that name in all sections, else ""."""
    found = [f"{name}.{key}" for name in Run.model_fields if key in _keys([name])]
    return found[0] if len(found) == 1 else ""


def with_current_names(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """A copy of a run's fields in which old names are replaced, and the places of the old names that were found.

    Raises ValueError: a table has a field under both names.

    >>> with_current_names({"checkpoint": {"keep": 3}})
    ({'checkpoint': {'keep_last': 3}}, [('checkpoint', 'keep')])
    """
    current, found = copy.deepcopy(dict(fields)), []
    for place, new in RENAMED.items():
        *sections, old = place
        for table in _tables(current, sections):
            if old not in table:
                continue
            if new in table:
                section = ".".join(sections)
                raise ValueError(f"'{section}.{old}' is the old name of '{section}.{new}': give only '{section}.{new}'")
            table[new] = "none" if table[old] == "as-is" else table[old]
            del table[old]
            found.append(place)
    return current, found


def renaming(place: tuple[str, ...]) -> str:
    """The sentence for a field that was given under its old name."""
    *sections, old = place
    value = " (and its value 'as-is' to 'none')" if old == "weights" else ""
    return (
        f"{'.'.join(place)} was renamed to {'.'.join([*sections, RENAMED[place]])}{value}. The next release rejects the old name."
    )


def _tables(fields: dict[str, Any], sections: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of a section: one, several for a list of tables, or none."""
    found: list[Any] = [fields]
    for section in sections:
        found = [table[section] for table in found if isinstance(table, dict) and section in table]
        found = [table for value in found for table in (value if isinstance(value, list | tuple) else [value])]
    return [table for table in found if isinstance(table, dict)]
