"""The HTML page about a dataset.

Counts over all documents come from dataset.json and its indices. Properties of training rows are measured on rows of sampled
documents. The same dataset and seed give the same page, byte for byte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import orjson

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.pack import Int32, Int64, MappingStatus, Rows, TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_ids

from . import charts
from .interlinear import Cell, Interlinear, visible

# ---- what bounds the page and the time
MOST_TARGETS = 1 << 20
EXAMPLES = 10
EXAMPLE_CELLS = 300
EXAMPLE_CHARACTERS = 8000  # on both sides together
MOST_SHARDS = 500
QUARANTINE_BYTES = 16 << 20
MOST_REASONS = 20
REASON_CHARACTERS = 120
ID_CHARACTERS = 120


def page(dataset: AlignedDataset, sample: int, seed: int, row_length: int) -> str:
    """The page about a dataset. Its size and the time to make it do not grow with the number of documents."""
    documents = sampled(len(dataset), sample, seed)
    interlinear = Interlinear(dataset)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template.filters |= {"share": share, "size": size}
    return template.get_template("report.html").render(
        name=dataset.path.resolve().name,
        dataset=dataset,
        manifest=dataset.manifest,
        totals=dataset.totals,
        ios=truncated_share(dataset.totals.covered_tokens, dataset.totals.mapped_tokens),
        widths=up_to_last(dataset.totals.span_widths[1:]),
        seed=seed,
        rows=measure_rows(dataset, documents, row_length, seed),
        lengths=charts.doubling("Student tokens per document", dataset.student_lengths, "documents"),
        overlaps=overlaps(interlinear),
        examples=[Example.of(interlinear, int(document)) for document in documents[:EXAMPLES]],
        refused=bad_records(dataset),
        shards=dataset.manifest.shards[:MOST_SHARDS],
    )


def sampled(count: int, sample: int, seed: int) -> Int32:
    """Documents in random order, each at most once."""
    random = np.random.default_rng(seed)
    chosen: Int32 = random.choice(count, min(sample, count), replace=False).astype(np.int32)
    return chosen


# ---- rows


@dataclass(frozen=True)
class Capacity:
    """The rows and targets that do not fit a teacher that reads at most `positions` positions."""

    positions: int
    rows: int  # rows with more
    targets: int  # `MappingStatus.BEYOND_TEACHER`


@dataclass(frozen=True)
class RowSample:
    """Measurements on rows of sampled documents, concatenated as in training."""

    row_length: int
    documents: int
    rows: int
    targets: int
    by_mapping: dict[str, int]
    teacher_mean: float  # positions per row
    teacher_p99: float
    teacher_max: int
    ratios: charts.Chart
    capacities: list[Capacity]
    starts: int  # number of row starts after the first row
    inside: int  # number of starts inside a teacher token, because no common boundary was near
    backs: list[int]  # number of starts that moved back by 0, 1, … student tokens


def measure_rows(dataset: AlignedDataset, documents: Int32, row_length: int, seed: int) -> RowSample:
    """Measure rows of documents. Reads at most about MOST_TARGETS student tokens."""
    student, teacher = (Front(front_ids(each.path) or ()) for each in (dataset.student_tokenizer, dataset.teacher_tokenizer))
    rows = Rows(dataset, documents, row_length, TeacherIds(dataset, front=teacher), student)
    # without the last row, which is short and would count as a complete one
    chosen = sampled(max(len(rows) - 1, 1), max(MOST_TARGETS // row_length, 1), seed).tolist()
    measured = [rows[k] for k in chosen]
    student_read = np.array([len(row.lead_ids) + len(row.input_ids) for row in measured])
    teacher_read = np.array([len(row.teacher_lead_ids) + len(row.teacher_input_ids) for row in measured])
    kinds = np.bincount(np.concatenate([row.mapping for row in measured]), minlength=len(MappingStatus))
    lasts = np.concatenate([row.last + len(row.teacher_lead_ids) for row in measured])
    later = [k for k in chosen if k]
    backs = np.array([k * rows.stride - rows.start(k) for k in later], np.int64)
    firsts = [rows.pieces(k)[0] for k in later]
    return RowSample(
        row_length=row_length,
        documents=len(documents),
        rows=len(measured),
        targets=len(lasts),
        by_mapping={kind.name: int(kinds[kind]) for kind in MappingStatus},
        teacher_mean=float(teacher_read.mean()),
        teacher_p99=float(np.quantile(teacher_read, 0.99)),
        teacher_max=int(teacher_read.max()),
        ratios=charts.histogram("Teacher positions per student position", teacher_read / student_read, "rows", "{:.3f}".format),
        capacities=list(capacities(teacher_read, lasts, row_length)),
        starts=len(later),
        inside=sum(not dataset.common_boundary(p.document, p.start, p.start + 1)[0] for p in firsts),
        backs=np.bincount(backs).tolist(),
    )


def capacities(teacher: Int64, lasts: Int32, row_length: int) -> Iterator[Capacity]:
    """Capacities in ascending order, up to the first one that all rows fit.

    teacher  teacher positions of each row
    lasts    teacher positions that each target needs
    """
    for factor in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 3, 4, 6, 8):
        positions = int(factor * row_length)
        longer = int((teacher > positions).sum())
        yield Capacity(positions, longer, int((lasts > positions).sum()))
        if not longer:
            return


# ---- vocabularies


@dataclass(frozen=True)
class Overlap:
    """Sizes of two vocabularies and of their intersection. by: the property that is compared."""

    by: str
    common: int
    student: int
    teacher: int


def overlaps(interlinear: Interlinear) -> list[Overlap]:
    """The overlap of the strings in tokenizer.json, and of the bytes of text that they represent."""
    student, teacher = interlinear.student, interlinear.teacher
    by_string = set(student.pieces), set(teacher.pieces)
    by_bytes = set(student.bytes) - {b""}, set(teacher.bytes) - {b""}
    return [
        Overlap("strings as written", len(by_string[0] & by_string[1]), len(by_string[0]), len(by_string[1])),
        Overlap("bytes of text", len(by_bytes[0] & by_bytes[1]), len(by_bytes[0]), len(by_bytes[1])),
    ]


# ---- examples


@dataclass(frozen=True)
class Example:
    """The beginning of a document."""

    document: int
    id: str  # "" without
    student_tokens: int
    teacher_tokens: int
    shown: int  # student tokens
    blocks: list[list[Cell]]

    @classmethod
    def of(cls, interlinear: Interlinear, document: int) -> Example:
        blocks = list(beginning(interlinear.blocks(document)))
        tokens = {cell.student.token for block in blocks for cell in block if cell.student}
        dataset = interlinear.dataset
        n, m = int(dataset.student_lengths[document]), int(dataset.teacher_lengths[document])
        return cls(document, visible(dataset.id(document)[:ID_CHARACTERS]), n, m, len(tokens), blocks)


def beginning(blocks: Iterator[list[Cell]]) -> Iterator[list[Cell]]:
    """The first blocks that fit into an example. The last one may be cut."""
    cells, characters = EXAMPLE_CELLS, EXAMPLE_CHARACTERS
    for block in blocks:
        for i, cell in enumerate(block):
            cells -= 1
            characters -= sum(len(part.text) for part in cell if part)
            if cells < 0 or characters < 0:
                yield block[:i]
                return
        yield block


# ---- what was left out


@dataclass(frozen=True)
class BadRecords:
    """The records in quarantine.jsonl. reasons: the most frequent ones in the lines that were read, with their counts."""

    lines: int
    complete: bool  # all lines were read
    reasons: list[tuple[str, int]]


def bad_records(dataset: AlignedDataset) -> BadRecords:
    """Count the reasons in quarantine.jsonl. Reasons that differ only in their numbers count as one."""
    left, reasons = QUARANTINE_BYTES, Counter[str]()
    for shard in dataset.manifest.shards:
        if "quarantine.jsonl" not in shard.files:
            continue
        with (dataset.path / shard.path / "quarantine.jsonl").open("rb") as lines:
            while line := lines.readline(left + 1):
                left -= len(line)
                if left < 0:
                    return BadRecords(reasons.total(), False, reasons.most_common(MOST_REASONS))
                reason = re.sub(r"\d[\d,]*", "#", orjson.loads(line)["reason"])
                reasons[reason[:REASON_CHARACTERS]] += 1
    return BadRecords(reasons.total(), True, reasons.most_common(MOST_REASONS))


# ---- how numbers are written


def share(part: int, whole: int) -> str:
    if not whole:
        return "–"
    return "< 0.001 %" if 0 < part < whole / 200_000 else f"{100 * part / whole:.3f} %"


def up_to_last(counts: Sequence[int]) -> Sequence[int]:
    """The counts without the zeros at the end."""
    return counts[: max((i + 1 for i, count in enumerate(counts) if count), default=0)]


def truncated_share(part: int, whole: int) -> str:
    """A percentage that is rounded down, so that it is 100 % only if part == whole."""
    return "100 %" if part == whole else f"{100_000 * part // whole / 1000:.3f} %"


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"
