"""Plots as SVG files, with equal bytes for equal numbers. Lines and bars are means over seeds, bands and whiskers one sd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.evidence.statistics import Sample

STYLE: Any = {
    "svg.hashsalt": "evidence",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.facecolor": "white",
}
COLORS = {
    "clm": "#4d4d4d",
    "random": "#a6761d",
    "student": "#7570b3",
    "guided": "#d95f02",
    "oracle": "#1b9e77",
    "rho1": "#e7298a",
}


def draw_curves(path: Path, arms: Mapping[str, Mapping[float, Sample]], title: str, along: str) -> None:
    """arms: name -> position on the horizontal axis -> score"""

    def draw(axes: Axes) -> None:
        for arm, steps in arms.items():
            means = [value.mean for value in steps.values()]
            (line,) = axes.plot(list(steps), means, marker="o", markersize=3, label=arm, color=COLORS.get(arm))
            spread = [value.sd or 0.0 for value in steps.values()]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(steps), low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set_xlabel(along)

    _save(path, draw, title)


def draw_bars(path: Path, arms: Mapping[str, Mapping[str, Sample]], title: str) -> None:
    """arms: name -> kind -> value, with a group of bars per arm"""
    kinds = list(dict.fromkeys(kind for values in arms.values() for kind in values))

    def draw(axes: Axes) -> None:
        width = 0.8 / max(1, len(kinds))
        for place, kind in enumerate(kinds):
            known = [(i, values[kind]) for i, values in enumerate(arms.values()) if kind in values]
            at = [i + (place - (len(kinds) - 1) / 2) * width for i, _ in known]
            spread = [value.sd or 0.0 for _, value in known]
            axes.bar(at, [value.mean for _, value in known], width, yerr=spread, label=kind, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(arms)), list(arms))
        axes.grid(visible=False, axis="x")

    _save(path, draw, title)


def draw_points(path: Path, points: Sequence[tuple[str, float, Sample]], title: str, along: str) -> None:
    """points: name, position on the horizontal axis, score"""

    def draw(axes: Axes) -> None:
        for name, x, value in points:
            axes.errorbar(x, value.mean, yerr=value.sd or 0.0, marker="o", color="#d95f02", linewidth=0.8)
            axes.annotate(name, (x, value.mean), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel(along)
        axes.margins(0.12)

    _save(path, draw, title, legend=False)


def _save(path: Path, draw: Callable[[Axes], None], title: str, legend: bool = True) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=9)
        if legend:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
