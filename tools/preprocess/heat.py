"""Makes one HTML page about the sample rows of a run: their text as a heat map, and a slider over the run's evaluations.

The numbers above the text cover all recorded rows. If there are many, the page shows only the first rows and some of the
evaluations, so that it stays small.
"""

from __future__ import annotations

import itertools
import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from megatron_vocagno.batch.pack import Float32, Int32, MappingStatus
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import CorpusError, RunError
from megatron_vocagno.training.sample_files import SampleRows, SampleStep, read_rows, read_steps, summary

from .interlinear import Interlinear, Side, visible

# ---- what bounds the page
MOST_TOKENS = 8192  # student tokens
MOST_LOSSES = 400_000  # tokens times evaluations
MOST_STEPS = 200
MOST_CHARACTERS = 60  # per token

TEMPLATES = Path(__file__).with_name("templates")
HALF = 4  # colors on either side of the middle one


@dataclass(frozen=True)
class Token:
    space: str  # a space before a word, which is not colored
    text: str
    breaks: bool  # a line ends here

    @classmethod
    def of(cls, text: str, name: str) -> Token:
        """name: shown if text is ""."""
        shown = _legible(text) or name
        before = " " if shown.startswith(" ") and shown.strip() else ""
        return cls(before, shown.removeprefix(before), "\n" in text)


@dataclass(frozen=True)
class Passage:
    """The part of a row that comes from one document. start: position of its first token in the document."""

    document: int
    start: int
    tokens: list[Token]


@dataclass(frozen=True)
class Tile:
    """A number that follows the slider: its text for each evaluation, and its line over all evaluations."""

    title: str
    note: str
    texts: list[str]
    lines: list[list[tuple[float, float]]]  # percent of the width, percent from the top; evaluations without a number are gaps


def page(run: Path, data: Path | None = None) -> str:
    """The page about a run's samples.

    run   the run's output folder
    data  the dataset of its data.valid; by default at the path that the run recorded

    Raises RunError: no samples, or another dataset. Raises CorpusError: the dataset is damaged.
    """
    rows, steps = read_rows(run), read_steps(run)
    if not steps:
        raise RunError(f"{run} has no evaluation of its sample rows yet: the first one is written before the first step")
    dataset = _dataset(run, rows, data)
    if dataset.fingerprint != rows.fingerprint:
        raise RunError(
            f"{dataset.path} ({dataset.fingerprint}) is not the dataset of the sample rows in {run} ({rows.fingerprint}).\n"
            "  Specify that dataset: --data FOLDER."
        )
    shown = _shown(rows)
    views = _spread(steps, min(MOST_STEPS, max(2, MOST_LOSSES // max(1, int(shown.sum())))))
    interlinear = Interlinear(dataset)
    script = (TEMPLATES / "heat.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("heat.html").render(
        name=run.resolve().name,
        rows=len(rows),
        passages=[list(_passages(interlinear, rows, r, shown[r])) for r in range(len(rows)) if shown[r].any()],
        evaluations=len(steps),
        views=[view.step for view in views],
        headlines=[_headline(rows, view) for view in views],
        tiles=_tiles([summary(rows, view) for view in views]),
        guidance=views[-1].guidance,
        graded=any(((view.weight_RS > 0) & (view.weight_RS < 1)).any() for view in views),
        guided=any(np.isfinite(view.guide_RS).any() for view in views),
        data=_data(interlinear.teacher, rows, views, shown),
        script=Markup(script),
        hash=b64encode(sha256(script.encode()).digest()).decode(),
        colors=range(2 * HALF + 1),
    )


def _dataset(run: Path, rows: SampleRows, data: Path | None) -> AlignedDataset:
    if data is not None:
        return AlignedDataset.open(data)
    try:
        return AlignedDataset.open(rows.dataset)
    except CorpusError as error:
        raise RunError(
            f"{error}\n  {run} has sample rows of this dataset. If you have moved it, specify its new place: --data FOLDER."
        ) from None


def _shown(rows: SampleRows) -> NDArray[np.bool_]:
    """[R, S] the tokens to show: as many complete rows as fit into MOST_TOKENS, or the start of the first row."""
    ends = rows.valid_RS.sum(axis=1).cumsum()
    fitting = max(1, int((ends <= MOST_TOKENS).sum()))
    shown = rows.valid_RS.copy()
    shown[fitting:] = False
    shown[0, MOST_TOKENS:] = False
    return shown


def _spread(steps: Sequence[SampleStep], most: int) -> list[SampleStep]:
    """At most `most` evaluations, evenly spaced, including the first and the last."""
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[place] for place in places.tolist()]


# ---- the text


def _passages(interlinear: Interlinear, rows: SampleRows, r: int, shown_S: NDArray[np.bool_]) -> Iterator[Passage]:
    documents, places, targets = (x[r][shown_S] for x in (rows.document_RS, rows.token_RS, rows.target_RS))
    cuts = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    for begin, end in itertools.pairwise(cuts):
        start = int(places[begin])
        tokens = interlinear.student.readings(targets[begin:end], start)[0]
        shown = [Token.of(token.data.decode(errors="surrogateescape"), token.name) for token in tokens]
        yield Passage(int(documents[begin]), start, shown)


def _legible(text: str) -> str:
    """The text with signs for invisible characters other than spaces, shortened to MOST_CHARACTERS."""
    shown = visible(text).replace("␣", " ").replace("␊", "↵")
    return shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 1] + "…"


# ---- the numbers


def _headline(rows: SampleRows, view: SampleStep) -> str:
    mapped = int(rows.mapped_RS.sum())
    kept = int((rows.mapped_RS & (view.weight_RS > 0)).sum())
    when = f"After step {view.step:,}" if view.step else "Before the first step"
    if not view.guidance.selects:
        return f"{when}, the loss covers every token: {view.guidance.objective} does not select tokens."
    behind = "its teacher" if view.guidance.equal_parts is None else "its teacher in the same part"
    if view.guidance.unit == "chunk":
        behind += " on the same chunk of text"
    excess = {
        "top_k": f"those with the largest excess loss over {behind}",
        "threshold": f"all but those on which it is ahead of {behind} by {view.guidance.threshold:g} nats or more",
        "control_variate": f"with less weight on those on which it is not behind {behind}",
    }[view.guidance.weighting]
    those = {
        "guided": excess,
        "student": "those with its highest losses",
        "random": "random ones",
    }[view.guidance.objective]
    return f"{when}, the student would learn from {kept:,} of {mapped:,} mapped tokens: {those}."


def _tiles(numbers: Sequence[dict[str, float]]) -> list[Tile]:
    nats = "{:.3f}".format
    named = (
        ("share_kept", "Share kept", "of the mapped tokens", "{:.1%}".format),
        ("student_loss_kept", "Loss of the kept", "student’s mean, nats", nats),
        ("student_loss_dropped", "Loss of the dropped", "student’s mean, nats", nats),
    )
    losses = [of.get(f"samples/{name}", math.nan) for of in numbers for name, *_ in named[1:]]
    known = [loss for loss in losses if math.isfinite(loss)]
    tiles = []
    for name, title, note, form in named:
        values = [of.get(f"samples/{name}", math.nan) for of in numbers]
        # both losses have the same scale, so that their lines can be compared
        bounds = (0.0, 1.0) if name == "share_kept" else (min(known, default=0), max(known, default=1))
        texts = [form(value) if math.isfinite(value) else "–" for value in values]
        tiles.append(Tile(title, note, texts, _lines(values, *bounds)))
    return tiles


def _lines(values: Sequence[float], least: float, most: float) -> list[list[tuple[float, float]]]:
    """One line for each run of consecutive evaluations that have the number."""
    last, span = max(1, len(values) - 1), most - least or 1
    stretches = itertools.groupby(enumerate(values), key=lambda place: math.isfinite(place[1]))
    return [
        [(round(100 * i / last, 2), round(100 * (most - value) / span, 2)) for i, value in stretch]
        for known, stretch in stretches
        if known
    ]


def _data(teacher: Side, rows: SampleRows, views: Sequence[SampleStep], shown: NDArray[np.bool_]) -> dict[str, Any]:
    """The data of the page's script. Losses are in hundredths of a nat, weights in hundredths; null if a token has no loss."""
    guides: list[list[int | None]] = []
    entries: list[dict[str, Any]] = []
    for view in views:
        guide = _hundredths(view.guide_RS[shown])
        # a frozen teacher has the same guide in every evaluation
        if guide not in guides:
            guides.append(guide)
        entry = {"loss": _hundredths(view.student_loss_RS[shown]), "guide": guides.index(guide)}
        if view.guidance.unit == "chunk":
            entry["excess"] = _hundredths(view.excess_RS(rows)[shown])
        weights = view.weight_RS[shown].tolist()
        # a small weight is not shown as 0
        entries.append(entry | {"weight": [math.ceil(round(100 * weight, 4)) for weight in weights]})
    excess = np.abs(np.concatenate([view.excess_RS(rows)[shown] for view in views]))
    losses = np.concatenate([x[shown] for view in views for x in (view.student_loss_RS, view.guide_RS)])
    return {
        "views": entries,
        "guides": guides,
        "selects": views[-1].guidance.objective if views[-1].guidance.selects else "",
        "kinds": "".join(str(kind) for kind in rows.mapping_RS[shown].tolist()),
        "reasons": [kind.name.lower().replace("_", " ") for kind in MappingStatus],
        "spans": [[int(first), int(last)] for first, last in zip(rows.first_RS[shown], rows.last_RS[shown], strict=True)],
        "row": [int(r) for r in np.nonzero(shown)[0]],
        "teacher": [_names(teacher, ids) for ids, shown_S in zip(rows.teacher_RU, shown, strict=True) if shown_S.any()],
        "limits": {"excess": _limit(excess), "loss": _limit(losses)},
        "half": HALF,
    }


def _hundredths(losses: Float32) -> list[int | None]:
    return [round(100 * loss) if math.isfinite(loss) else None for loss in losses.tolist()]


def _names(side: Side, ids: Int32) -> list[str]:
    """The teacher's tokens of a row, as the page shows them. Spaces are shown as signs."""
    eos = {side.info.eos_id: visible(side.info.eos_token)}
    known = ids[ids >= 0].tolist()
    return [visible(side.bytes[id_].decode(errors="surrogateescape"))[:MOST_CHARACTERS] or eos.get(id_, "∅") for id_ in known]


def _limit(values: Float32) -> float:
    """End of the color scale, in nats: 98 % of the values are below."""
    finite = values[np.isfinite(values)]
    return max(0.5, math.ceil(2 * float(np.quantile(finite, 0.98))) / 2) if len(finite) else 1.0
