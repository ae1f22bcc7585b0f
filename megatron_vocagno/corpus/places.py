"""Files and folders by path or URL: `data/a.jsonl`, `file:///data/a.jsonl`, `s3://bucket/a.jsonl`, `memory://a.jsonl`.

A local one is a `pathlib.Path`; any other is a `UPath`, which has the same methods and reads through fsspec. Object stores
need their fsspec package (s3fs, gcsfs, adlfs) and take credentials and endpoints from the environment.
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
    """Raises CorpusError for an unknown protocol, or one whose package is not installed."""
    if isinstance(url, Path):
        return url
    try:
        found = UPath(url)
    except (ValueError, ImportError) as error:
        raise CorpusError(f"cannot open {url}: {error}") from None
    return Path(found.path) if found.protocol in ("", "file", "local") else found


@contextmanager
def reaching(where: Place) -> Iterator[None]:
    """Each object store raises errors of its own. Raises CorpusError instead."""
    try:
        yield
    except (CorpusError, OSError):
        raise
    except Exception as error:
        if isinstance(where, Path):
            raise
        raise CorpusError(f"cannot use {where}: {type(error).__name__}: {error}") from error
