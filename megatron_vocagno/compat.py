"""Differences between the accepted versions of Python and of packages. No other module looks at a version.

setup.py has the accepted versions. A function imports the package that it is about, because most commands do not need it.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any, Protocol

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["add_note", "gguf_remedy", "product_precision", "sha256_of", "tomllib", "use_only_cache", "zstd"]


class Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


def zstd() -> Any:
    """The module of Python 3.14, or the package that has the same functions for older versions."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def sha256_of(stream: Readable) -> str:
    """The sha256 of the rest of a stream, in hexadecimal. hashlib.file_digest needs Python 3.11. Raises OSError."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an exception. Before Python 3.11 a traceback does not print it."""
    error.__notes__ = [*getattr(error, "__notes__", []), text]


def product_precision() -> Any:
    """The switch for products of float32 tensors on a CPU, which has a field `fp32_precision`. None before torch 2.9."""
    import torch

    return getattr(torch.backends.mkldnn, "matmul", None)


def use_only_cache(offline: bool) -> bool:
    """Whether to use only the cache of the Hub.

    huggingface_hub 1 requests the files of a full commit from the Hub even if HF_HUB_OFFLINE is set, unless it is asked not to.
    """
    from huggingface_hub import constants

    return offline or constants.HF_HUB_OFFLINE


def gguf_remedy() -> str:
    """The command that makes GGUF files readable; "" if they are. transformers before 5.19 fails on files without a BOS id."""
    from importlib import metadata, util

    found = metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < (5, 19):
        return f"transformers 5.19 or newer (installed: {found}): pip install 'transformers>=5.19'"
    return "" if util.find_spec("gguf") else "gguf: pip install 'megatron-vocagno[gguf]'"
