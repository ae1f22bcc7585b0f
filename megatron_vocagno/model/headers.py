"""Reads and checks the index and the headers of a folder's safetensors files, before any weight is read.

A file consists of 8 bytes with the length of the header, the header, and the data. The header is a JSON object: tensor name ->
type, shape, and byte offsets in the data. In a sharded folder, model.safetensors.index.json maps each tensor to its file.
transformers reads all tensors in the files that the index lists. Other programs read the tensors that the index lists. The index
and the headers must therefore agree.
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
"""Names of the weights, or of their index, in a folder. The first one that exists is read."""
SUFFIX = ".safetensors"
LENGTH = 8
"""Bytes in which a file stores the length of its header."""


@dataclass(frozen=True)
class Stored:
    """The place and the type of a tensor in a file."""

    file: str
    """Name of the file, relative to the folder."""
    dtype: str
    """Type in safetensors' notation, for example "BF16"."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """The bytes of the file that hold the tensor, half-open."""


def weight_files(folder: Path) -> list[Path]:
    """The WEIGHT_FILES that exist in a folder. The first one is read."""
    return [file for name in WEIGHT_FILES if (file := folder / name).is_file()]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Tensor name -> its place. Raises ModelError: a damaged file, or an index that contradicts the headers of its files."""
    source = weight_files(folder)[0]
    if source.suffix != ".json":
        return read_header(source, source.name)
    listed, metadata = read_index(source)
    if not isinstance(metadata, dict):
        raise ModelError(
            f"{source} has no 'metadata' object, and transformers does not read an index without one. Add "
            '"metadata": {} to the index.'
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        for tensor, stored in read_header(folder / name, name).items():
            if tensor in found:
                raise ModelError(
                    f"the weights in {folder} are ambiguous: {tensor} is in {found[tensor].file} and in {name}. Are these files "
                    "from two downloads?"
                )
            found[tensor] = stored
    for tensor, name in listed.items():
        if tensor not in found or found[tensor].file != name:
            actual = f"it is in {found[tensor].file}" if tensor in found else "no file of the index has it"
            raise ModelError(f"{source} lists {tensor} in {name}, but {actual}. Does the index belong to these files?")
    if unlisted := sorted(found.keys() - listed.keys()):
        raise ModelError(
            f"{source} does not list {unlisted[0]}, which is in {found[unlisted[0]].file}: it lists {len(listed):,} tensors, and "
            f"its files hold {len(found):,}. Does the index belong to these files?"
        )
    return found


def read_index(index: Path) -> tuple[dict[str, str], object]:
    """The index of sharded weights: tensor name -> name of the file that holds it, and the metadata.

    Raises ModelError: the index is damaged, or lists a file outside its folder.
    """
    text = index.read_bytes()
    if pointer := lfs_pointer(text):
        raise ModelError(f"{index} {pointer}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error}. Was the download complete?") from error
    for what, value in (("it", content), ("its weight_map", content.get("weight_map", {}) if isinstance(content, dict) else {})):
        if not isinstance(value, dict):
            raise ModelError(
                f"{index} cannot be read: {what} is a {type(value).__name__}, not an object. Which program wrote the index?"
            )
    if "weight_map" not in content:
        raise ModelError(f"{index} cannot be read: it has no 'weight_map'. Was the download complete?")
    file_of: dict[str, str] = content["weight_map"]
    if not file_of:
        raise ModelError(f"{index} cannot be read: its weight_map is empty. Was it written before the weights were?")
    for tensor, name in file_of.items():
        if not _is_within(name):
            raise ModelError(
                f"{index} lists {tensor} in {name!r}, which is not the name of a safetensors file inside {index.parent}. Which "
                "program wrote the index?"
            )
    return file_of, content.get("metadata")


def _is_within(name: object) -> bool:
    """Whether a name is a path of a safetensors file inside a folder. Only the text is checked, because each file in the Hub's
    cache is a link to a place outside the folder.
    """
    if not isinstance(name, str) or not name.endswith(SUFFIX) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_header(file: Path, name: str) -> dict[str, Stored]:
    """Tensor name -> its place in a file. name: the file's name in the results. Raises ModelError: a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(LENGTH)
        length = int.from_bytes(start, "little")
        fits = LENGTH + length <= size
        text = opened.read(length) if fits else opened.read(LENGTH * 8)
    if pointer := lfs_pointer(start + text):
        raise ModelError(f"{file} {pointer}")
    if len(start) < LENGTH or not fits:
        found = f"the header claims {length:,} bytes, but the file has only {size:,}"
        if len(start) < LENGTH:
            found = f"the file has {size:,} bytes"
        raise ModelError(f"the weights in {file} are damaged: {found}. Was the download complete?")
    header = _parsed(text, file)
    data = _data_bytes(header)
    if data is not None and (expected := LENGTH + length + data) != size:
        cause = "Was the download complete?" if size < expected else "Was something added after it was written?"
        raise ModelError(
            f"the weights in {file} are damaged: the file has {size:,} bytes, but {expected:,} by its header. {cause}"
        )
    # safetensors checks the rest of the header: types, shapes, tensors without gaps, no further bytes. numpy: without torch
    with readable(file), safe_open(file, framework="numpy"):
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
                f"the weights in {file} are damaged: its header has {twice} twice, and it is undefined which one is read. Which "
                "program wrote the file?"
            )
        return content

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"the weights in {file} are damaged: its header is not JSON: {error}. Is it a safetensors file, and was the download "
            "complete?"
        ) from error
    if not isinstance(header, dict):
        raise ModelError(
            f"the weights in {file} are damaged: its header is a {type(header).__name__}, not an object. Which program wrote it?"
        )
    header.pop("__metadata__", None)
    return header


def _data_bytes(header: dict[str, Any]) -> int | None:
    """Bytes of the data after the header; None if an entry has no valid offsets, which safetensors reports later."""
    try:
        return max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return None


@contextmanager
def readable(weights: Path) -> Iterator[None]:
    """A context for reading weights. Raises ModelError: the file is cut off, or is not a safetensors file."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"the weights in {weights} are damaged: {error}. Was the download complete?") from error
