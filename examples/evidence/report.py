"""Write docs/evidence.md from stored results, and the tables and plots next to it.

    docs/evidence.md              one page: the results and the experiments, from templates/evidence.md
    docs/evidence/NAME.md         all tables, plots and findings of one experiment, from templates/NAME.md
    docs/evidence/arms.md         how to read the tables, and every arm, from templates/arms.md
    docs/evidence/NAME.jsonl      the scores of all runs of the experiment; NAME.json: when and how they were made
    docs/evidence/*.svg           the plots

A person writes the findings, in conclusions/NAME-DIGEST.md, for the numbers that have this digest.
Results of another machine, or of changed code, have another digest, and their pages have no findings.

The functions that a template calls return Markdown: a table, a number, or the link to a plot that they draw.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from examples.evidence import plots
from examples.evidence.running import ARMS, EXPERIMENTS, HERE
from examples.evidence.statistics import Row, Sample, curve, final, interval, paired, reached, sample
from megatron_vocagno.compat import tomllib
from megatron_vocagno.errors import UserError

PAGE = HERE.parent.parent / "docs" / "evidence.md"
CONCLUSIONS = HERE / "conclusions"
NOTHING = "–"
OF_ANOTHER_SHARE = {"keep-0.2": "random-0.2", "keep-0.6": "random-0.6"} | dict.fromkeys(
    ("keep-0.8", "chunk-keep-0.8", "student-0.8", "threshold", "control-variate"), "random-0.8"
)
"""The control that keeps the same share as an arm, if it is not `random`. Not every experiment has it."""


class NoResults(UserError):
    """There is nothing to report."""


def write(source: Path, page: Path) -> list[Path]:
    """Write the page, and the files in the folder of the same name, from the results in `source`.

    source: a folder with NAME.jsonl and NAME.json for at least one experiment, such as .evidence/results or docs/evidence

    Returns the missing files of conclusions: one per set of results without written findings.
    Raises NoResults, and then leaves an existing page as it is.
    """
    files = [path for name in EXPERIMENTS if (path := source / f"{name}.jsonl").exists()]
    if not files:
        raise NoResults(f"{source} has no results: run the experiments first")
    results = Results({path.stem: load(path) for path in files}, page.parent / page.stem)
    conclusions = {name: CONCLUSIONS / f"{name}-{digest(rows)}.md" for name, rows in results.rows.items()}
    everything = digest([row for rows in results.rows.values() for row in rows])
    conclusions["summary"] = CONCLUSIONS / f"summary-{everything}.md"
    notes = {path.stem: json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in files}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE / "templates", CONCLUSIONS]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = {name: getattr(results, name) for name in FUNCTIONS}
    given = functions | {"arms": arms_table(), "notes": notes, "experiments": list(results.rows)}
    given["conclusions"] = {name: path.name for name, path in conclusions.items()}
    results.folder.mkdir(parents=True, exist_ok=True)
    for name in ("arms", *results.rows):
        text = environment.get_template(f"{name}.md").render(given, name=name)
        (results.folder / f"{name}.md").write_text(text, encoding="utf-8")
    page.write_text(environment.get_template("evidence.md").render(given), encoding="utf-8")
    if source.resolve() != results.folder.resolve():
        for path in files:
            shutil.copyfile(path, results.folder / path.name)
            shutil.copyfile(path.with_suffix(".json"), results.folder / f"{path.stem}.json")
    return [path for path in conclusions.values() if not path.exists()]


def digest(rows: Sequence[Row]) -> str:
    """Digest of all scores. The costs do not count."""
    measured = [{name: value for name, value in row.items() if name != "costs"} for row in rows]
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:8]


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def arms_table() -> str:
    """Every arm, with the first line of its run file and the fields that it sets."""
    rows = ["| arm | | fields of its run file |", "|---|---|---|"]
    for path in sorted(ARMS.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        fields = tomllib.loads(text)
        said = [f"`{name} = {json.dumps(value)}`" for name, value in fields.get("guidance", {}).items()]
        said += [f"teacher `{teacher['placement']}`" for teacher in [fields.get("teacher")] if teacher]
        rows.append(f"| `{path.stem}` | {text.splitlines()[0].removeprefix('# ')} | {', '.join(said)} |")
    return "\n".join(rows)


@dataclass(frozen=True)
class Results:
    """rows: by experiment. folder: for the pages of tables and their plots."""

    rows: Mapping[str, Sequence[Row]]
    folder: Path

    def has(self, experiment: str, setting: str, arm: str = "clm") -> bool:
        return bool(self._of(experiment, setting, arm))

    def comparison(
        self,
        experiment: str,
        setting: str,
        judge: str,
        higher_is_better: bool,
        others: Mapping[str, str] | None = None,
        arms: Sequence[str] | None = None,
        form: str = ".3f",
    ) -> str:
        """A table of the arms of a setting.

        The columns are the judge at the last step, its paired differences to `clm` and to the random control, other scores,
        and the cost of reaching clm's last score.

        others: score -> title of its column
        arms:   by default all, in the order in which they ran
        """
        others = others or {}
        clm = final(self._of(experiment, setting, "clm"), judge)
        head = [
            "arm",
            "learning rate",
            f"{judge.replace('_', ' ')} {'↑' if higher_is_better else '↓'}",
            "− clm",
            "− random",
            *others.values(),
            "clm's last score reached at",
        ]
        lines = [head, ["---"] * len(head)]
        for arm in arms or self._arms(experiment, setting):
            rows = self._of(experiment, setting, arm)
            if not (values := final(rows, judge)):
                continue
            control = OF_ANOTHER_SHARE.get(arm, "random")
            references = {"clm": clm, control: final(self._of(experiment, setting, control), judge)}
            differences = [None if arm == name else paired(values, reference) for name, reference in references.items()]
            cells = [f"`{arm}`", _rates(rows), sample([*values.values()]).show(form)]
            cells += [NOTHING if found is None else found.show(form) for found in differences]
            for score in others:
                cells.append(_shown(final(rows, score), ".3f"))
            cells.append(NOTHING if arm == "clm" else _reached(rows, judge, clm, higher_is_better))
            lines.append(cells)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def differences(
        self, experiment: str, settings: Sequence[str], scores: Mapping[str, str], reference: str = "clm", form: str = ".3f"
    ) -> str:
        """A table of the paired differences of each arm to a reference.

        A cell is the mean difference ± half of its 95 % confidence interval, and the pairs with the more frequent sign. The
        interval is over seeds if there is one setting. Runs of one setting are not independent of each other, so with several
        settings it is over the means of the settings.

        scores: score -> title of its column
        """
        lines = [["arm", *scores.values()], ["---"] * (1 + len(scores))]
        for arm in dict.fromkeys(arm for setting in settings for arm in self._arms(experiment, setting) if arm != reference):
            cells = []
            for score in scores:
                pairs = []
                for setting in settings:
                    base = final(self._of(experiment, setting, reference), score)
                    values = final(self._of(experiment, setting, arm), score)
                    pairs.append([value - base[seed] for seed, value in values.items() if seed in base])
                cells.append(_interval([of_setting for of_setting in pairs if of_setting], form))
            if any(cell != NOTHING for cell in cells):
                lines.append([f"`{arm}`", *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def value(self, experiment: str, setting: str, arm: str, score: str, form: str = ".3f") -> str:
        """A score at the last step: mean ± sd (n)."""
        return _shown(final(self._of(experiment, setting, arm), score), form)

    def mean(self, experiment: str, setting: str, arm: str, score: str, form: str = ".3f") -> str:
        """A score at the last step: its mean over seeds, and n if it is a single seed."""
        values = final(self._of(experiment, setting, arm), score)
        if not values:
            return NOTHING
        found = sample([*values.values()])
        return f"{found.mean:{form}}".replace("%", " %") + (" (n=1)" if found.n == 1 else "")

    def curves(self, experiment: str, setting: str, score: str, title: str, arms: Sequence[str] | None = None) -> str:
        """A plot of a score over the steps, with one line per arm."""
        drawn = {}
        for arm in arms or self._arms(experiment, setting):
            if found := _over_steps(self._of(experiment, setting, arm), score):
                drawn[arm] = found
        return self._plot(f"{experiment}-{setting}-{score}", title, plots.draw_curves, drawn, "step")

    def bars(
        self, experiment: str, setting: str, scores: Mapping[str, str], title: str, arms: Sequence[str] | None = None
    ) -> str:
        """A plot of several scores at the last step, with one group of bars per arm. scores: score -> its name in the legend."""
        drawn: dict[str, dict[str, Sample]] = {}
        for arm in arms or self._arms(experiment, setting):
            found = {name: final(self._of(experiment, setting, arm), score) for score, name in scores.items()}
            if any(found.values()):
                drawn[arm] = {name: sample([*values.values()]) for name, values in found.items() if values}
        name = f"{experiment}-{setting}-{'-'.join(scores)}"
        return self._plot(name, title, plots.draw_bars, drawn)

    def shares(
        self, experiment: str, settings: Mapping[str, float], score: str, title: str, along: str, arms: Sequence[str]
    ) -> str:
        """A plot of a score at the last step over settings that differ in one number. settings: name -> that number."""
        drawn: dict[str, dict[float, Sample]] = {}
        for arm in arms:
            for setting, x in settings.items():
                if values := final(self._of(experiment, setting, arm), score):
                    drawn.setdefault(arm, {})[x] = sample([*values.values()])
        name = f"{experiment}-{'-'.join(settings)}-{score}"
        return self._plot(name, title, plots.draw_curves, drawn, along)

    def points(self, experiment: str, setting: str, along: str, score: str, title: str, arms: Sequence[str]) -> str:
        """A plot of one score over another, with one point per arm."""
        drawn = []
        for arm in arms:
            rows = self._of(experiment, setting, arm)
            x, y = final(rows, along), final(rows, score)
            if x and y:
                drawn.append((arm, sample([*x.values()]).mean, sample([*y.values()])))
        name = f"{experiment}-{setting}-{along}-{score}"
        return self._plot(name, title, plots.draw_points, drawn, along)

    def _of(self, experiment: str, setting: str, arm: str) -> list[Row]:
        return [row for row in self.rows.get(experiment, ()) if row["setting"] == setting and row["arm"] == arm]

    def _arms(self, experiment: str, setting: str) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows.get(experiment, ()) if row["setting"] == setting))

    def _plot(self, name: str, title: str, draw: Callable[..., None], drawn: object, *more: str) -> str:
        """The link to a plot, or nothing if there is nothing to draw."""
        if not drawn:
            return ""
        path = self.folder / f"{name}.svg"
        draw(path, drawn, title, *more)
        return f"![{title}]({path.name})"


FUNCTIONS = ("comparison", "differences", "value", "mean", "curves", "bars", "shares", "points", "has")
"""The methods of Results that templates call."""


def _over_steps(rows: Sequence[Row], score: str) -> dict[float, Sample]:
    by_seed = curve(rows, score)
    steps = sorted({step for values in by_seed.values() for step in values})
    return {step: sample([values[step] for values in by_seed.values() if step in values]) for step in steps}


def _interval(differences: Sequence[Sequence[float]], form: str) -> str:
    """differences: of each setting, by seed."""
    if not differences:
        return NOTHING
    found = sample(differences[0] if len(differences) == 1 else [sample(of_setting).mean for of_setting in differences])
    half, every = interval(found), [d for of_setting in differences for d in of_setting]
    spread = "" if half is None else f" ± {half:{form}}"
    same, sign = max((sum(d > 0 for d in every), "+"), (sum(d < 0 for d in every), "−"))
    return f"{found.mean:+{form}}{spread} ({same} of {len(every)} {sign})".replace("-", "−")


def _shown(values: Mapping[int, float], form: str) -> str:
    return sample([*values.values()]).show(form) if values else NOTHING


def _rates(rows: Sequence[Row]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in rows}))


def _reached(rows: Sequence[Row], judge: str, goals: dict[int, float], higher_is_better: bool) -> str:
    """Steps and FLOPs up to the first checkpoint that is as good as clm's last one: means over the seeds that have one."""
    found = reached(rows, judge, goals, higher_is_better)
    there = [one for one in found.values() if one is not None]
    if not found:
        return NOTHING
    if not there:
        return f"never (0 of {len(found)})"
    steps, student, teacher = (
        sample([getattr(one, field) for one in there]).mean for field in ("step", "student_flops", "teacher_flops")
    )
    flops = f"{student:.2g}" + (f" + {teacher:.2g} of the teacher" if teacher else "")
    return f"step {steps:.0f}, {flops} FLOPs ({len(there)} of {len(found)})"
