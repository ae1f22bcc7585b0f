"""Which teacher it was: a sha256 that says so without reading every byte.

Of a Hugging Face folder: its configuration, and of each tensor name, dtype, shape and 8 blocks of 4 KiB, evenly spread. So it
does not depend on how the tensors are dealt to files, takes seconds for a model of any size, and another training of the same
architecture has another one. Of a GGUF file: its size, its first megabyte and 4,096 such blocks; a folder that was converted from
one in float32, and not changed since, has the file's.

An edit that leaves every sampled block alone, as of a few rows of an embedding, is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_vocagno.model.folder import ModelError, model_folder

BLOCK = 4096
BLOCKS_A_TENSOR = 8
BLOCKS_A_FILE = 4096
HEAD = 1 << 20
NO_MATTER = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Fields of a configuration that change no logits."""
CONVERTED = "converted_from.json"
"""Of a folder that was a GGUF file: the file's fingerprint, and the folder's own as it was written."""
CONVERSION = 2
"""Another number wherever GGUF files are converted otherwise than before: what was made of them is then made anew."""


def teacher_fingerprint(path: str | os.PathLike[str]) -> str:
    """Of a Hugging Face folder or a .gguf file. Raises ModelError where there is neither, or it is damaged."""
    path = Path(path).expanduser()
    digest = hashlib.sha256()
    try:
        if path.suffix == ".gguf":
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(bytes([CONVERSION]) + size.to_bytes(8, "little") + file.read(HEAD))
                _add_blocks(digest, file, 0, size, BLOCKS_A_FILE)
            return digest.hexdigest()
        folder = model_folder(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps({k: v for k, v in config.items() if k not in NO_MATTER}, sort_keys=True).encode())
        for name, dtype, shape, file_name, begin, end in sorted(_tensors(folder)):
            digest.update(json.dumps([name, dtype, shape]).encode())
            with (folder / file_name).open("rb") as file:
                _add_blocks(digest, file, begin, end, BLOCKS_A_TENSOR)
        if (folder / CONVERTED).is_file():
            record = json.loads((folder / CONVERTED).read_text(encoding="utf-8"))
            if record["folder"] == digest.hexdigest():
                return str(record["gguf"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a model: {error}. Was the download complete?") from None
    return digest.hexdigest()


def _tensors(folder: Path) -> Iterator[tuple[str, str, list[int], str, int, int]]:
    """Name, dtype, shape, file, and the bytes of the file that hold it."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in files:
        with (folder / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                begin, end = entry["data_offsets"]
                yield tensor, entry["dtype"], entry["shape"], name, 8 + length + begin, 8 + length + end


def _add_blocks(digest: hashlib._Hash, file: BinaryIO, begin: int, end: int, blocks: int) -> None:
    """The bytes [begin, end) of a file: so many blocks of them, the first and the last among them, or all where that is less."""
    if end - begin <= blocks * BLOCK:
        file.seek(begin)
        digest.update(file.read(end - begin))
        return
    for block in range(blocks):
        file.seek(begin + (end - begin - BLOCK) * block // (blocks - 1))
        digest.update(file.read(BLOCK))
