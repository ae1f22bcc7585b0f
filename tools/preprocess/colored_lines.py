"""A document of a dataset -> colored lines for a terminal."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import DatasetError

from .interlinear import CLOSE, CLOSE_UNMAPPED, OPEN, OPEN_UNMAPPED, Cell, CellPart, Interlinear, visible

COLORS = ["cyan", "magenta", "green"]  # colors of a terminal's theme, which are legible
UNMAPPED_COLOUR = "red"
NARROW = 60  # with fewer columns, the names of the sides are one letter
LEGEND = f"{OPEN} {CLOSE} token   {OPEN_UNMAPPED} {CLOSE_UNMAPPED} unmapped   ␣ ␊ space, line feed   ⟨c3⟩ part of a character"


def chosen(dataset: AlignedDataset, index: int, id_: str | None, any_document: bool) -> int:
    """Number of the document. Raises DatasetError: there is no such document."""
    if any_document:
        return random.randrange(len(dataset))
    if id_ is not None:
        if dataset.manifest.id_key is None:
            raise DatasetError(f"{dataset.path} has no ids: it was built without --id-key. Use the number of a document")
        found = next((i for i in range(len(dataset)) if dataset.id(i) == id_), None)
        if found is None:
            raise DatasetError(f"{dataset.path}: none of its {len(dataset):,} documents has the id {id_!r}")
        return found
    if not 0 <= index < len(dataset):
        raise DatasetError(f"{dataset.path}: no document {index}. There are {len(dataset):,}, and the first one is 0")
    return index


def shown(interlinear: Interlinear, document: int, start: int, stop: int | None, width: int) -> Iterator[Text]:
    """Lines of at most `width` columns. Raises DatasetError: the document does not have the tokens [start, stop)."""
    dataset, blocks = interlinear.dataset, interlinear.blocks(document, start, stop)
    n, m = int(dataset.student_lengths[document]), int(dataset.teacher_lengths[document])
    id_ = f", {visible(dataset.id(document))}" if dataset.id(document) else ""
    yield from wrapped(f"document {document:,} of {len(dataset):,}{id_}: {n:,} student tokens, {m:,} teacher tokens", width)
    yield from wrapped(LEGEND, width)
    names = ("student", "teacher") if width >= NARROW else ("s", "t")
    digits = len(f"{max(n, m):,}")
    room = max(width - len(names[0]) - digits - 2, 8)
    for cells in lines(blocks, room):
        yield Text()
        yield row(cells, [cell.student for cell in cells], names[0], digits)
        yield row(cells, [cell.teacher for cell in cells], names[1], digits)


def wrapped(text: str, width: int) -> Iterator[Text]:
    return iter(Text(text, style="dim").wrap(Console(width=width), width))


def lines(blocks: Iterable[list[Cell]], room: int) -> Iterator[list[Cell]]:
    """Lines of cells that fit into `room` columns. Blocks are not split if they fit, and a line feed in the text ends a line."""
    line: list[Cell] = []
    used = 0
    for block in blocks:
        cells = [piece for cell in block for piece in pieces(cell, room)]
        needed = sum(columns(cell) for cell in cells)
        if line and used + needed > room:
            yield line
            line, used = [], 0
        for cell in cells:
            if line and used + columns(cell) > room:
                yield line
                line, used = [], 0
            line.append(cell)
            used += columns(cell)
        if any("␊" in part.text for cell in cells for part in cell if part):
            yield line
            line, used = [], 0
    if line:
        yield line


def columns(cell: Cell) -> int:
    """Width of a cell: its text and two brackets."""
    return max(cell_len(part.text) for part in cell if part) + 2


def pieces(cell: Cell, room: int) -> list[Cell]:
    """The cell, or its pieces if it is too wide for a line."""
    if columns(cell) <= room:
        return [cell]
    sides = [[] if part is None else chop_cells(part.text, room - 2) for part in cell]
    count = max(len(texts) for texts in sides)
    cut = []
    for k in range(count):
        parts = []
        for part, texts in zip(cell, sides, strict=True):
            text = texts[k] if k < len(texts) else ""
            ends = {"starts": k == 0 and part.starts, "ends": k == count - 1 and part.ends} if part else {}
            parts.append(part._replace(text=text, **ends) if part else None)
        cut.append(Cell(*parts))
    return cut


def row(cells: list[Cell], parts: list[CellPart | None], name: str, digits: int) -> Text:
    """One side of a line: its name, the position of its first token, and the cells."""
    first = next((f"{part.token:,}" for part in parts if part), "")
    line = Text.assemble((f"{name} {first:>{digits}} ", "dim"))
    for cell, part in zip(cells, parts, strict=True):
        line.append_text(drawn(part, columns(cell), style(cell, part)))
    return line


def drawn(part: CellPart | None, width: int, style: str) -> Text:
    if part is None:
        return Text(" " * width)
    opening, closing = (OPEN, CLOSE) if part.mapped else (OPEN_UNMAPPED, CLOSE_UNMAPPED)
    opening, closing = opening if part.starts else " ", closing if part.ends else " "
    gap = " " * (width - 2 - cell_len(part.text))
    return Text(f"{opening}{part.text}{gap}{closing}", style)


def style(cell: Cell, part: CellPart | None) -> str:
    """The color of the student token, underlined for a part of a teacher token that several student tokens share."""
    if part is None or not part.mapped:
        return UNMAPPED_COLOUR
    color = COLORS[cell.student.token % len(COLORS)] if cell.student else "default"
    shared = part is cell.teacher and not (part.starts and part.ends)
    return f"{color} underline" if shared else color
