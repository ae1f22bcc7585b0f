"""What a folder's safetensors hold: its index and the header of each file, read and checked before any number is read.

A file is 8 bytes with the length of a header, the header, and the numbers. The header is a JSON object: tensor name -> type,
shape, and where the numbers lie after the header. Of a sharded folder, model.safetensors.index.json says which file has which
tensor. transformers reads all that lies in the files that an index names, and others what the index names. So both must tell the
same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_vocagno.errors import ModelError, lfs_pointer

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""Of a folder; the first of them that is there is read."""
SUFFIX = ".safetensors"
LENGTH = 8
"""Bytes of a header's length."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    """Name of its file, within the folder."""
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """The bytes of the file that hold it, half-open."""


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights or the index of their files, whichever are there; the first is read."""
    return [file for name in WEIGHT_FILES if (file := folder / name).is_file()]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Tensor name -> where it lies. Raises ModelError: a damaged file, or an index that tells otherwise than its files."""
    source = weight_files(folder)[0]
    if source.suffix != ".json":
        return read_header(source, source.name)
    listed, metadata = read_index(source)
    if not isinstance(metadata, dict):
        raise ModelError(
            f"{source} has no 'metadata', or none that is an object, and transformers reads no index without it. Add "
            '"metadata": {} to it.'
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        for tensor, stored in read_header(folder / name, name).items():
            if tensor in found:
                raise ModelError(
                    f"the weights in {folder} are ambiguous: {tensor} lies in {found[tensor].file} and in {name}. Are these "
                    "files of two downloads?"
                )
            found[tensor] = stored
    for tensor, name in listed.items():
        if tensor not in found or found[tensor].file != name:
            there = f"it lies in {found[tensor].file}" if tensor in found else "no file of the index has it"
            raise ModelError(f"{source} says that {tensor} lies in {name}, but {there}. Is the index that of these files?")
    if more := sorted(found.keys() - listed.keys()):
        raise ModelError(
            f"{source} does not list {more[0]}, which lies in {found[more[0]].file}: its files hold {len(found):,} tensors, and "
            f"it lists {len(listed):,}. Is the index that of these files?"
        )
    return found


def read_index(index: Path) -> tuple[dict[str, str], object]:
    """Tensor name -> name of the file that holds it, of sharded weights; and the metadata of the index. Raises ModelError."""
    text = index.read_bytes()
    if pointer := lfs_pointer(text):
        raise ModelError(f"{index} {pointer}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error}. Was the download complete?") from error
    for what, value in (("it", content), ("its weight_map", content.get("weight_map", {}) if isinstance(content, dict) else {})):
        if not isinstance(value, dict):
            raise ModelError(f"{index} cannot be read: {what} is a {type(value).__name__}, not an object. Who wrote it?")
    if "weight_map" not in content:
        raise ModelError(f"{index} cannot be read: it has no 'weight_map'. Was the download complete?")
    file_of: dict[str, str] = content["weight_map"]
    if not file_of:
        raise ModelError(f"{index} cannot be read: its weight_map lists nothing. Was it written before the weights were?")
    for tensor, name in file_of.items():
        if not _is_within(name):
            raise ModelError(
                f"{index} says that {tensor} lies in {name!r}, which is no name of a safetensors file within {index.parent}. Who "
                "wrote the index?"
            )
    return file_of, content.get("metadata")


def _is_within(name: object) -> bool:
    """By its words alone: in the Hub's cache each file is a link that leads elsewhere."""
    if not isinstance(name, str) or not name.endswith(SUFFIX) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_header(file: Path, name: str) -> dict[str, Stored]:
    """Tensor name -> where it lies in a file. name: of the file, for the answer. Raises ModelError: a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(LENGTH)
        length = int.from_bytes(start, "little")
        fits = LENGTH + length <= size
        text = opened.read(length) if fits else opened.read(LENGTH * 8)
    if pointer := lfs_pointer(start + text):
        raise ModelError(f"{file} {pointer}")
    if len(start) < LENGTH or not fits:
        raise ModelError(
            f"the weights in {file} are damaged: the file has {size:,} bytes, and its header alone would take {length:,}. Was "
            "the download complete?"
        )
    header = _parsed(text, file)
    numbers = _bytes_of(header)
    if numbers is not None and (said := LENGTH + length + numbers) != size:
        cause = "Was the download complete?" if size < said else "Was something added after it was written?"
        raise ModelError(f"the weights in {file} are damaged: the file has {size:,} bytes, its header says {said:,}. {cause}")
    # what else a header must be is for safetensors to say: types, shapes, tensors side by side, and no byte more
    with readable(file), safe_open(file, framework="pt"):
        pass
    return {
        tensor: Stored(name, entry["dtype"], tuple(entry["shape"]), *(LENGTH + length + at for at in entry["data_offsets"]))
        for tensor, entry in header.items()
    }


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(
                f"the weights in {file} are damaged: its header has {twice} twice, and readers take one or the "
                "other. Who wrote it?"
            )
        return content

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"the weights in {file} are damaged: its header is no JSON: {error}. Is it a safetensors file, and was the download "
            "complete?"
        ) from error
    if not isinstance(header, dict):
        raise ModelError(
            f"the weights in {file} are damaged: its header is a {type(header).__name__}, not an object. Who wrote it?"
        )
    header.pop("__metadata__", None)
    return header


def _bytes_of(header: dict[str, Any]) -> int | None:
    """Of all numbers; None where an entry has no offsets, which safetensors refuses in its own words."""
    try:
        return max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return None


@contextmanager
def readable(weights: Path) -> Iterator[None]:
    """While safetensors are read. Raises ModelError: a file that was cut off, or is none."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"the weights in {weights} are damaged: {error}. Was the download complete?") from error
