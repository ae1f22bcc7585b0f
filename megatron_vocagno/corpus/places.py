"""Files and folders by path or URL: `data/a.jsonl`, `file:///data/a.jsonl`, `s3://bucket/a.jsonl`, `memory://a.jsonl`.

A local path is a `pathlib.Path`. Any other is a `UPath`, which has the same methods and reads through fsspec. An object store
needs its fsspec package (s3fs, gcsfs, adlfs), which reads credentials and endpoints from the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from upath import UPath

from megatron_vocagno.errors import CorpusError

Place: TypeAlias = Path | UPath


def place(url: str | Place) -> Place:
    """The path object of a path or URL. Raises CorpusError for an unknown protocol, or if its package is not installed."""
    if isinstance(url, Path):
        return url
    try:
        found = UPath(url)
    except (ValueError, ImportError) as error:
        raise CorpusError(f"cannot open {url}: {error}") from None
    return Path(found.path) if found.protocol in ("", "file", "local") else found


@contextmanager
def reaching(where: Place) -> Iterator[None]:
    """Convert the errors of object stores, which have their own classes. Raises CorpusError instead of them."""
    try:
        yield
    except (CorpusError, OSError):
        raise
    except Exception as error:
        if isinstance(where, Path):
            raise
        raise CorpusError(f"cannot use {where}: {type(error).__name__}: {error}") from error
