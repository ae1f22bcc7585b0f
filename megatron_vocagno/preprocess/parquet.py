"""Parquet files: their row groups, and the texts in them. Imported where there is one: pyarrow takes 0.2 s and 50 MB.

Memory is one row group's columns, compressed; of a large row group a few pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import BrokenInput, CorpusError
from megatron_vocagno.preprocess.streams import REMOTE_BUFFER, open_raw

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


class Column(NamedTuple):
    """A column, or a field of one: its names from the top, and both together as pyarrow and people call it."""

    path: tuple[str, ...]
    name: str


def row_groups(where: Place, text_keys: Sequence[str] = (), id_keys: Sequence[str] = ()) -> list[RowGroup]:
    """Raises BrokenInput for a file whose footer cannot be read, CorpusError where it has rows and no column for a key."""
    with _opened(where) as file:
        groups = _row_groups(file)
        if any(group.rows for group in groups):
            _columns(where, file.schema_arrow, text_keys, id_keys)
        return groups


def _row_groups(file: Any) -> list[RowGroup]:
    # of a damaged footer, pyarrow's metadata of a column ends the process; that of a row group does not
    groups = [RowGroup(g.num_rows, g.total_byte_size) for g in map(file.metadata.row_group, range(file.num_row_groups))]
    if min((n for group in groups for n in group), default=0) < 0 or sum(g.rows for g in groups) != file.metadata.num_rows:
        raise BrokenInput("damaged parquet data (the footer's counts contradict each other)")
    return groups


def rows(where: Place, start: int, stop: int, text_keys: Sequence[str], id_keys: Sequence[str]) -> Iterator[Row]:
    """Of the row groups [start, stop). Raises BrokenInput at a damaged page, CorpusError for columns that hold no text or ids."""
    with _opened(where) as file:
        metadata, groups = file.metadata, _row_groups(file)
    if not any(group.rows for group in groups[start:stop]):
        return  # of such files some have no column at all
    large = max((group.weight for group in groups[start:stop]), default=0) > LARGE_ROW_GROUP
    with _opened(where, metadata=metadata, buffer_size=REMOTE_BUFFER if large else 0) as file:
        columns = _columns(where, file.schema_arrow, text_keys, id_keys)
        after = [0, *accumulate(group.rows for group in groups)]
        number = after[start]
        for i in range(start, stop):
            for text, id_ in _row_group(file, i, groups[i], columns):
                yield Row(number, text, id_)
                number += 1
            if number != after[i + 1]:
                raise BrokenInput(
                    f"damaged parquet data (row group {i} ends at row {number:,}, the footer says {after[i + 1]:,})"
                )


def _row_group(file: Any, i: int, group: RowGroup, columns: list[Column]) -> Iterator[tuple[bytes | None, bytes | None]]:
    """texts, ids"""
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.weight)))
    for batch in file.iter_batches(size, row_groups=[i], columns=[column.name for column in columns], use_threads=False):
        texts, *ids = (_bytes(_of(batch, column)) for column in columns)
        yield from zip(texts, *ids or [[None] * len(texts)], strict=True)


def _of(batch: Any, column: Column) -> Any:
    """Its values in a batch of rows; null where a struct around it is."""
    top = batch.column(column.path[0])
    return pc.struct_field(top, list(column.path[1:])) if column.path[1:] else top


@contextmanager
def _opened(where: Place, **options: Any) -> Iterator[Any]:
    try:
        with open_raw(where) as raw, pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True, **options) as file:
            yield file
    except (pa.ArrowException, NotImplementedError, UnicodeError, OSError) as error:
        # pyarrow has OSError for damaged data too, but without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error).splitlines()[0]
        if "decrypt" in said.lower():
            raise BrokenInput(f"encrypted parquet data ({said}): write it without encryption") from None
        if isinstance(error, NotImplementedError) or "not supported" in said:
            raise BrokenInput(f"parquet data that pyarrow {pa.__version__} cannot read ({said}): write it anew") from None
        raise BrokenInput(f"damaged parquet data ({said})") from None


def _columns(where: Place, schema: Any, text_keys: Sequence[str], id_keys: Sequence[str]) -> list[Column]:
    """Of the texts, and of the ids where there are any: the first of the keys that is a column."""
    found = []
    for keys, option, kinds in ((text_keys, "--text-key", "strings"), (id_keys, "--id-key", "strings or integers")):
        if not keys:
            continue
        fields = {key: field for key in keys if (field := _field(where, schema, key)) is not None}
        if not fields:
            asked = " or ".join(map(repr, keys))
            raise CorpusError(f"{where}: no column {asked} (it has {_some(schema.names)}); {option} names another")
        key, (path, kind) = next(iter(fields.items()))
        if not (_is_text(kind) or pa.types.is_null(kind) or (keys is id_keys and pa.types.is_integer(kind))):
            fit = [name for name, inner in _leaves(schema) if _is_text(inner)]
            raise CorpusError(f"{where}: column {key!r} is {kind}, not {kinds} (these are: {_some(fit)}); {option} names another")
        found.append(Column(path, key))
    return found


def _field(where: Place, schema: Any, key: str) -> tuple[tuple[str, ...], Any] | None:
    """Names from the top, and the type of the values. A column that is called `a.b` comes before the field b of a."""
    if schema.names.count(key) > 1:
        raise CorpusError(f"{where}: {schema.names.count(key)} columns are called {key!r}: rename all but one")
    if key in schema.names:
        return (key,), _values(schema.field(key).type)
    top, *path = key.split(".")
    if not path or schema.names.count(top) != 1:
        return None
    kind = schema.field(top).type
    for name in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return (top, *path), _values(kind)


def _leaves(fields: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Columns, and fields of structs, with their types."""
    for field in fields:
        kind = _values(field.type)
        if pa.types.is_struct(kind):
            yield from _leaves([kind.field(i) for i in range(kind.num_fields)], f"{above}{field.name}.")
        else:
            yield above + field.name, kind


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
