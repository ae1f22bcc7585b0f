"""Experiment 4, beyond the paper: chunks instead of tokens, and weights from the likelihood ratio, on held-out text.

It repeats the third experiment (`continued`) with other rules, for two initial students and two sets of texts. The second student
was trained for three times as long, so it is closer to the end of its learning. The two sets share no piece of mathematics or
code. Their word problems, and those of their tests, are drawn from the same templates and numbers, with other names, things and
errors. The rules and their constants were found on the first set of texts, so the other set is the test of them.

A seed determines the order of rows and the draws of `random`. A difference between two arms has the same student, texts and seed
on both sides.

Three more questions, with the same rules: facts of which most are wrong (`mechanism`), a student from scratch (`noise`), and a
student that was pretrained on 2 T tokens: SmolLM2-135M-Instruct, which continues with the mixture under Gemma-3-270M.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from examples.evidence import continued, mechanism, noise
from examples.evidence.continued import LONG, OTHER, SETTING, SMOLLM2, TUNING, spec_of
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.lessons import Setting
from examples.evidence.running import Options, Run, Spec, experiment
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
CONTROLS, SEEDS_OF_CONTROLS = ("random", "guided", "keep-0.8"), 3
"""Arms that are known to lose to plain training run with fewer seeds."""
ONCE = {"oracle": "clm", "token-threshold": "threshold", "constant-variate": "control-variate"}
"""Arms that run at the first seed only, and the arm whose learning rate they have."""
RULES = ("chunk-keep-0.8", "threshold", "control-variate")
ELSEWHERE = ("clm", "guided", *RULES)
"""Arms of the other questions. Their rates are those of the experiments that they come from."""
SEEDS_ELSEWHERE = 3
OF_SMOLLM2, SEEDS_OF_SMOLLM2, RATE_OF_SMOLLM2 = ("clm", "control-variate"), 2, 5e-5
RATES = (5e-4, 1e-3, 1.5e-3, 2e-3)
LOGGED = ("weight", "likelihood_ratio", "share_below")
"""Metrics of the run that become scores: means over the steps since the last checkpoint."""


def runs(options: Options) -> Sequence[Spec]:
    if options.quick:
        return [_spec(SETTING, arm, 1, options) for arm in (("clm",), ("control-variate",))]
    specs = []
    for seed in range(1, options.seeds + 1):
        arms = [arm for arm in MAIN if seed <= SEEDS_OF_CONTROLS or arm[0] not in CONTROLS]
        arms += [(arm,) for arm in ONCE if seed == 1]
        specs += [_spec(setting, arm, seed, options) for arm in arms for setting in SETTINGS]
    for seed in range(1, min(options.seeds, SEEDS_ELSEWHERE) + 1):
        for arm in ELSEWHERE:
            specs += [mechanism.spec_of(Setting(kind, 0.6), arm, seed, options) for kind in ("random", "systematic")]
            specs.append(noise.spec_of(noise.SETTING, arm, seed, learning_rate("noise", arm), options))
    for seed in range(1, SEEDS_OF_SMOLLM2 + 1):
        specs += [spec_of("beyond", SETTING + SMOLLM2, arm, seed, RATE_OF_SMOLLM2, options) for arm in OF_SMOLLM2]
    return specs


def tuning(options: Options) -> Sequence[Spec]:
    return [
        spec_of("beyond", setting, arm, SEED, rate, options, *more)
        for setting in (TUNING, TUNING + LONG)
        for arm, *more in MAIN
        for rate in RATES
    ]


def _spec(setting: str, arm: Sequence[str], seed: int, options: Options) -> Spec:
    name, *more = arm
    variant = "".join(f"-{field.partition('=')[2]}" for field in more)
    rate = RATES[1] if options.quick else learning_rate("beyond", ONCE.get(name, name) + variant)
    return spec_of("beyond", setting, name, seed, rate, options, *more)


def prepare(specs: Sequence[Spec], options: Options) -> None:
    for name in dict.fromkeys(spec.experiment for spec in specs):
        of_name = [spec for spec in specs if spec.experiment == name]
        (continued if name == "beyond" else experiment(name)).prepare(of_name, options)


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
    smollm2 = {"smollm2_steps": f"{continued.steps_of(options, SMOLLM2)}", "smollm2_rate": f"{RATE_OF_SMOLLM2:g}"}
    return continued.words(options) | smollm2
