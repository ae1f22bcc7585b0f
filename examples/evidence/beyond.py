"""Experiment 4, beyond the paper: chunks instead of tokens, and weights from the likelihood ratio, on held-out text.

It repeats the third experiment (`continued`) with other rules, for two initial students and two sets of texts. The second student
was trained for three times as long, so it is closer to the end of its learning. The two sets share no piece of mathematics or
code. Their word problems, and those of their tests, are drawn from the same templates and numbers, with other names, things and
errors. The rules and their constants were found on the first set of texts, so the other set is the test of them.

A seed determines the order of rows and the draws of `random`. A difference between two arms has the same student, texts and seed
on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from examples.evidence import continued
from examples.evidence.continued import LONG, OTHER, SETTING, TUNING, spec_of
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.running import Options, Run, Spec
from megatron_vocagno.training.monitor import read_metrics

JUDGE, HIGHER_IS_BETTER = continued.JUDGE, continued.HIGHER_IS_BETTER

SETTINGS = (SETTING, SETTING + LONG, SETTING + OTHER, SETTING + OTHER + LONG)
OF_80 = "guidance.keep=0.8"
MAIN: tuple[tuple[str, ...], ...] = (
    ("clm",),
    ("random", OF_80),
    ("student", OF_80),
    ("guided",),
    ("keep-0.8",),
    ("chunk-keep-0.8",),
    ("threshold",),
    ("control-variate",),
)
"""Arms, and the fields that change them. The weights of `threshold` and `control-variate` have means of about 0.8 and 0.7."""
ONCE: tuple[tuple[str, ...], ...] = (("oracle",), ("token-threshold",), ("constant-variate",))
"""Arms that run at the first seed only."""
RATES = (5e-4, 1e-3, 1.5e-3, 2e-3)
LOGGED = ("weight", "likelihood_ratio", "share_below")
"""Metrics of the run that become scores: means over the steps since the last checkpoint."""


def runs(options: Options) -> Sequence[Spec]:
    if options.quick:
        return [_spec(SETTING, arm, 1, options) for arm in (("clm",), ("control-variate",))]
    arms = [(seed, arm) for seed in range(1, options.seeds + 1) for arm in (*MAIN, *(ONCE if seed == 1 else ()))]
    return [_spec(setting, arm, seed, options) for seed, arm in arms for setting in SETTINGS]


def tuning(options: Options) -> Sequence[Spec]:
    return [
        spec_of("beyond", setting, arm, SEED, rate, options, *more)
        for setting in (TUNING, TUNING + LONG)
        for arm, *more in (*MAIN, *ONCE)
        for rate in RATES
    ]


def _spec(setting: str, arm: Sequence[str], seed: int, options: Options) -> Spec:
    name, *more = arm
    variant = "".join(f"-{field.partition('=')[2]}" for field in more)
    rate = RATES[1] if options.quick else learning_rate("beyond", name + variant)
    return spec_of("beyond", setting, name, seed, rate, options, *more)


prepare = continued.prepare


def score(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """The scores of the third experiment, and the means of the metrics LOGGED."""
    lines, before = read_metrics(run.output), 0
    for step, scores in continued.score(run):
        since = [line for line in lines if before < line["step"] <= step]
        for name in LOGGED:
            values = [line[f"guidance/{name}"] for line in since if f"guidance/{name}" in line]
            if values:
                scores[name] = sum(values) / len(values)
        before = step
        yield step, scores


def words(options: Options) -> dict[str, str]:
    return continued.words(options)
