"""The fingerprint of a teacher: a sha256 that identifies it without reading every byte.

The fingerprint of a Hugging Face folder covers its configuration and, for each tensor, the name, the dtype, the shape and 8
evenly spaced blocks of 4 KiB. It does not depend on how the tensors are distributed over files, and takes seconds for a model of
any size. Two trainings of one architecture have different fingerprints. The fingerprint of a GGUF file covers its size, its first
megabyte and 4,096 such blocks. A folder that was converted from a GGUF file in float32, and not changed since, has the
fingerprint of the file.

The fingerprint does not detect an edit that leaves every sampled block unchanged, for example of a few rows of an embedding.
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
BLOCKS_PER_TENSOR = 8
BLOCKS_PER_FILE = 4096
HEAD = 1 << 20
IGNORED_FIELDS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Fields of a configuration that do not change logits."""
CONVERTED = "converted_from.json"
"""File in a folder that was converted from a GGUF file. It records the fingerprints of the file and of the new folder."""
CONVERSION = 2
"""Version of the conversion of GGUF files. Raise it if the result changes, so that files are converted again."""


def teacher_fingerprint(path: str | os.PathLike[str]) -> str:
    """The fingerprint of a Hugging Face folder or a .gguf file. Raises ModelError: neither exists, or the file is damaged."""
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
                _add_blocks(digest, file, 0, size, BLOCKS_PER_FILE)
            return digest.hexdigest()
        folder = model_folder(path)
        config = _read_object(folder / "config.json")
        digest.update(json.dumps({k: v for k, v in config.items() if k not in IGNORED_FIELDS}, sort_keys=True).encode())
        for name, stored in sorted(stored_tensors(folder).items(), key=lambda item: item[0]):
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            with (folder / stored.file).open("rb") as file:
                _add_blocks(digest, file, stored.begin, stored.end, BLOCKS_PER_TENSOR)
        if (folder / CONVERTED).is_file():
            record = _read_object(folder / CONVERTED)
            if record["folder"] == digest.hexdigest():
                return str(record["gguf"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a model: {error}. Was the download complete?") from None
    return digest.hexdigest()


def _read_object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is a {type(content).__name__}, not an object")
    return content


def _add_blocks(digest: hashlib._Hash, file: BinaryIO, begin: int, end: int, blocks: int) -> None:
    """Add evenly spaced blocks of the bytes [begin, end) of a file, including the first and the last block. If there are
    fewer bytes than all blocks together, add them all.
    """
    if end - begin <= blocks * BLOCK:
        file.seek(begin)
        digest.update(file.read(end - begin))
        return
    for block in range(blocks):
        file.seek(begin + (end - begin - BLOCK) * block // (blocks - 1))
        digest.update(file.read(BLOCK))
