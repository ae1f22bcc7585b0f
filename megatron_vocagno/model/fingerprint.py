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
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vocagno.errors import ModelError, lfs_pointer
from megatron_vocagno.model.folder import model_folder
from megatron_vocagno.model.headers import stored_tensors

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
                size, head = os.fstat(file.fileno()).st_size, file.read(HEAD)
                if not head.startswith(b"GGUF"):
                    cause = lfs_pointer(head) or f"is not a GGUF file: it begins with {head[:4]!r}. Was the download complete?"
                    raise ModelError(f"{path} {cause}")
                digest.update(bytes([CONVERSION]) + size.to_bytes(8, "little") + head)
                _add_blocks(digest, file, 0, size, BLOCKS_A_FILE)
            return digest.hexdigest()
        folder = model_folder(path)
        config = _object(folder / "config.json")
        digest.update(json.dumps({k: v for k, v in config.items() if k not in NO_MATTER}, sort_keys=True).encode())
        for name, stored in sorted(stored_tensors(folder).items(), key=lambda item: item[0]):
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            with (folder / stored.file).open("rb") as file:
                _add_blocks(digest, file, stored.begin, stored.end, BLOCKS_A_TENSOR)
        if (folder / CONVERTED).is_file():
            record = _object(folder / CONVERTED)
            if record["folder"] == digest.hexdigest():
                return str(record["gguf"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a model: {error}. Was the download complete?") from None
    return digest.hexdigest()


def _object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is a {type(content).__name__}, not an object")
    return content


def _add_blocks(digest: hashlib._Hash, file: BinaryIO, begin: int, end: int, blocks: int) -> None:
    """The bytes [begin, end) of a file: so many blocks of them, the first and the last among them, or all where that is less."""
    if end - begin <= blocks * BLOCK:
        file.seek(begin)
        digest.update(file.read(end - begin))
        return
    for block in range(blocks):
        file.seek(begin + (end - begin - BLOCK) * block // (blocks - 1))
        digest.update(file.read(BLOCK))
