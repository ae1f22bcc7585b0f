"""Parquet files: their row groups, and the texts in them. Imported where there is one: pyarrow takes 0.2 s and 50 MB.

Memory is one row group's columns, compressed; of a large row group a few pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vocagno.corpus.places import Place
from megatron_vocagno.corpus.streams import REMOTE_BUFFER, BrokenInput, InputError, open_raw

BATCH_BYTES = 1 << 20  # of text decoded at once, by the mean of the row group
BATCH_ROWS = 64  # at most, since lengths differ
# A column of a smaller row group is read at once. In pieces, pyarrow takes up to 2 GB for a damaged page that claims them.
LARGE_ROW_GROUP = 128 << 20  # bytes uncompressed


class RowGroup(NamedTuple):
    """A part of a parquet file that is read by itself."""

    rows: int
    weight: int  # bytes uncompressed, of all columns


class Row(NamedTuple):
    """A record."""

    number: int  # in the file, from 0
    text: bytes | None  # as it is stored: null, perhaps not UTF-8
    id: bytes | None  # the same; a number in decimal. None where none is asked for


def row_groups(where: Place) -> list[RowGroup]:
    """Raises BrokenInput for a file whose footer cannot be read."""
    with _opened(where) as file:
        return _row_groups(file)


def _row_groups(file: Any) -> list[RowGroup]:
    # of a damaged footer, pyarrow's metadata of a column ends the process; that of a row group does not
    groups = [RowGroup(g.num_rows, g.total_byte_size) for g in map(file.metadata.row_group, range(file.num_row_groups))]
    if min((n for group in groups for n in group), default=0) < 0 or sum(g.rows for g in groups) != file.metadata.num_rows:
        raise BrokenInput("damaged parquet data (the footer's counts contradict each other)")
    return groups


def rows(where: Place, start: int, stop: int, text_key: str, id_key: str | None) -> Iterator[Row]:
    """Of the row groups [start, stop). Raises BrokenInput at a damaged page, InputError for columns that hold no text or ids."""
    with _opened(where) as file:
        metadata, groups = file.metadata, _row_groups(file)
    large = max((group.weight for group in groups[start:stop]), default=0) > LARGE_ROW_GROUP
    with _opened(where, metadata=metadata, buffer_size=REMOTE_BUFFER if large else 0) as file:
        _check_columns(where, file.schema_arrow, text_key, id_key)
        after = [0, *accumulate(group.rows for group in groups)]
        number = after[start]
        for i in range(start, stop):
            for text, id_ in _row_group(file, i, groups[i], text_key, id_key):
                yield Row(number, text, id_)
                number += 1
            if number != after[i + 1]:
                raise BrokenInput(
                    f"damaged parquet data (row group {i} ends at row {number:,}, the footer says {after[i + 1]:,})"
                )


def _row_group(
    file: Any, i: int, group: RowGroup, text_key: str, id_key: str | None
) -> Iterator[tuple[bytes | None, bytes | None]]:
    """texts, ids"""
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.weight)))
    columns = [text_key] if id_key is None else [text_key, id_key]
    for batch in file.iter_batches(size, row_groups=[i], columns=columns, use_threads=False):
        texts = _bytes(batch.column(text_key))
        yield from zip(texts, [None] * len(texts) if id_key is None else _bytes(batch.column(id_key)), strict=True)


@contextmanager
def _opened(where: Place, **options: Any) -> Iterator[Any]:
    try:
        with open_raw(where) as raw, pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True, **options) as file:
            yield file
    except (pa.ArrowException, UnicodeError, OSError) as error:
        # pyarrow has OSError for damaged data too, but without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BrokenInput(f"damaged parquet data ({str(error).splitlines()[0]})") from None


def _check_columns(where: Place, schema: Any, text_key: str, id_key: str | None) -> None:
    for key, option, kinds in ((text_key, "--text-key", "strings"), (id_key, "--id-key", "strings or integers")):
        if key is None:
            continue
        if key not in schema.names:
            raise InputError(f"{where}: no column {key!r} (it has {_some(schema.names)}); {option} names another")
        if schema.names.count(key) > 1:
            raise InputError(f"{where}: {schema.names.count(key)} columns are called {key!r}: rename all but one")
        kind = _values(schema.field(key).type)
        if not (_is_text(kind) or (key == id_key and pa.types.is_integer(kind))):
            fit = [field.name for field in schema if _is_text(_values(field.type))]
            raise InputError(f"{where}: column {key!r} is {kind}, not {kinds} (these are: {_some(fit)}); {option} names another")


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") or "none"


def _values(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    tests = "is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view"
    return any(getattr(pa.types, test)(storage) for test in tests)


def _bytes(column: Any) -> list[bytes | None]:
    if pa.types.is_integer(_values(column.type)):
        column = column.cast(pa.string())
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values
