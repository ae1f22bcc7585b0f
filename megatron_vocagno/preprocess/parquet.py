"""Parquet files: their row groups and texts.

Import this module only if there is a parquet file: pyarrow takes 0.2 s and 50 MB.

Memory is the compressed columns of one row group, or a few pages of a large row group.
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
from megatron_vocagno.errors import BrokenInputError, CorpusError
from megatron_vocagno.preprocess.streams import REMOTE_BUFFER, open_raw

BATCH_BYTES = 1 << 20  # text that is decoded at once, estimated by the mean of the row group
BATCH_ROWS = 64  # rows that are decoded at once at most, because lengths differ
# The columns of a smaller row group are read at once: in pieces, pyarrow allocates up to 2 GB for a damaged page.
LARGE_ROW_GROUP = 128 << 20  # bytes uncompressed


class RowGroup(NamedTuple):
    """A part of a parquet file that is read independently."""

    rows: int
    weight: int  # bytes uncompressed, all columns


class ParquetRow(NamedTuple):
    """A record.

    number  row in the file, from 0
    text    the stored bytes, which may be invalid UTF-8; None for null
    id      the stored bytes, or a number in decimal; None for null, or if no ids are read
    """

    number: int
    text: bytes | None
    id: bytes | None


class Column(NamedTuple):
    """A column, or a field of a column. path: its names from the top; name: the path joined by dots, as pyarrow calls it."""

    path: tuple[str, ...]
    name: str


def row_groups(where: Place, text_keys: Sequence[str] = (), id_keys: Sequence[str] = ()) -> list[RowGroup]:
    """The row groups of a file.

    Raises BrokenInputError for a damaged footer, CorpusError if the file has rows and no column for a key.
    """
    with _opened(where) as file:
        groups = _row_groups(file)
        if any(group.rows for group in groups):
            _columns(where, file.schema_arrow, text_keys, id_keys)
        return groups


def _row_groups(file: Any) -> list[RowGroup]:
    # With a damaged footer, pyarrow's metadata of a column crashes the process. The metadata of a row group does not.
    groups = [RowGroup(g.num_rows, g.total_byte_size) for g in map(file.metadata.row_group, range(file.num_row_groups))]
    if min((n for group in groups for n in group), default=0) < 0 or sum(g.rows for g in groups) != file.metadata.num_rows:
        raise BrokenInputError("damaged parquet data (the footer's counts contradict each other)")
    return groups


def rows(where: Place, start: int, stop: int, text_keys: Sequence[str], id_keys: Sequence[str]) -> Iterator[ParquetRow]:
    """The records of the row groups [start, stop).

    Raises BrokenInputError at a damaged page, CorpusError if the columns do not contain texts or ids.
    """
    with _opened(where) as file:
        metadata, groups = file.metadata, _row_groups(file)
    if not any(group.rows for group in groups[start:stop]):
        return  # a file without rows may have no columns either
    large = max((group.weight for group in groups[start:stop]), default=0) > LARGE_ROW_GROUP
    with _opened(where, metadata=metadata, buffer_size=REMOTE_BUFFER if large else 0) as file:
        columns = _columns(where, file.schema_arrow, text_keys, id_keys)
        after = [0, *accumulate(group.rows for group in groups)]
        number = after[start]
        for i in range(start, stop):
            for text, id_ in _row_group(file, i, groups[i], columns):
                yield ParquetRow(number, text, id_)
                number += 1
            if number != after[i + 1]:
                raise BrokenInputError(
                    f"damaged parquet data (row group {i} ends at row {number:,}, the footer says {after[i + 1]:,})"
                )


def _row_group(file: Any, i: int, group: RowGroup, columns: list[Column]) -> Iterator[tuple[bytes | None, bytes | None]]:
    """Pairs of a text and an id."""
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * group.rows // max(1, group.weight)))
    for batch in file.iter_batches(size, row_groups=[i], columns=[column.name for column in columns], use_threads=False):
        texts, *ids = (_bytes(_values_of(batch, column)) for column in columns)
        yield from zip(texts, *ids or [[None] * len(texts)], strict=True)


def _values_of(batch: Any, column: Column) -> Any:
    """The values of a column in a batch of rows. A field of a null struct is null."""
    top = batch.column(column.path[0])
    return pc.struct_field(top, list(column.path[1:])) if column.path[1:] else top


@contextmanager
def _opened(where: Place, **options: Any) -> Iterator[Any]:
    try:
        with open_raw(where) as raw, pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True, **options) as file:
            yield file
    except (pa.ArrowException, NotImplementedError, UnicodeError, OSError) as error:
        # pyarrow also raises OSError for damaged data, but without an error number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = str(error).splitlines()[0]
        if "decrypt" in message.lower():
            raise BrokenInputError(f"encrypted parquet data ({message}): write it without encryption") from None
        if isinstance(error, NotImplementedError) or "not supported" in message:
            raise BrokenInputError(f"parquet data that pyarrow {pa.__version__} cannot read ({message}): write it anew") from None
        raise BrokenInputError(f"damaged parquet data ({message})") from None


def _columns(where: Place, schema: Any, text_keys: Sequence[str], id_keys: Sequence[str]) -> list[Column]:
    """The column of the texts, and the column of the ids if there are id keys. The first key that is a column is used."""
    found = []
    for keys, option, kinds in ((text_keys, "--text-key", "strings"), (id_keys, "--id-key", "strings or integers")):
        if not keys:
            continue
        fields = {key: field for key in keys if (field := _field(where, schema, key)) is not None}
        if not fields:
            wanted = " or ".join(map(repr, keys))
            raise CorpusError(f"{where}: no column {wanted} (it has {_some(schema.names)}); {option} names another")
        key, (path, kind) = next(iter(fields.items()))
        if not (_is_text(kind) or pa.types.is_null(kind) or (keys is id_keys and pa.types.is_integer(kind))):
            fit = [name for name, inner in _leaves(schema) if _is_text(inner)]
            raise CorpusError(f"{where}: column {key!r} is {kind}, not {kinds} (these are: {_some(fit)}); {option} names another")
        found.append(Column(path, key))
    return found


def _field(where: Place, schema: Any, key: str) -> tuple[tuple[str, ...], Any] | None:
    """The path of a key and the type of its values; None if there is no such column.

    A column that is called `a.b` comes before the field b of a.
    """
    if schema.names.count(key) > 1:
        raise CorpusError(f"{where}: {schema.names.count(key)} columns are called {key!r}: rename all but one")
    if key in schema.names:
        return (key,), _value_type(schema.field(key).type)
    top, *path = key.split(".")
    if not path or schema.names.count(top) != 1:
        return None
    kind = schema.field(top).type
    for name in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return (top, *path), _value_type(kind)


def _leaves(fields: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Columns and fields of structs, with the types of their values."""
    for field in fields:
        kind = _value_type(field.type)
        if pa.types.is_struct(kind):
            yield from _leaves([kind.field(i) for i in range(kind.num_fields)], f"{above}{field.name}.")
        else:
            yield above + field.name, kind


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") or "none"


def _value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    tests = "is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view"
    return any(getattr(pa.types, test)(storage) for test in tests)


def _bytes(column: Any) -> list[bytes | None]:
    if pa.types.is_integer(_value_type(column.type)):
        column = column.cast(pa.string())
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values
