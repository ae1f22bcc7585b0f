"""Experiment 1, mechanism: facts to recall, with most lines wrong. Does the guidance keep the right tokens and drop the others?

The teacher learned the facts from clean lines, with other tokens. A student reads lines of which a share is wrong. Each line is a
document, and no line is read twice. Training and test share their facts, because the experiment measures recall. Settings:

    random-0.6        60 % of the lines have a new random value each time, with all three digits wrong
    systematic-0.6    always the same wrong value, which is then more frequent than the right one
    random-0          no line is wrong
    …-gaps            the teacher learned wrong values for a quarter of the facts, and never read another quarter
    …-wide            the student's tokens are wider than the teacher's, which makes aggregates differ
    …-4-micro-batches a step has four micro-batches instead of one, which makes scopes differ
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.evidence import facts as task
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.lessons import (
    CHECKPOINTS,
    ORACLE,
    PARTS,
    Files,
    Setting,
    Sizes,
    batch_of,
    known_facts,
    knows,
    open_tokenizer,
    prepare_datasets,
    prepare_teachers,
    run_overrides,
    write_oracle_of,
)
from examples.evidence.recall import recall
from examples.evidence.running import Options, Run, Spec
from examples.evidence.sampled import measured_overlap, shares_kept
from examples.evidence.students import open_student
from megatron_vocagno.training.monitor import read_metrics

JUDGE, HIGHER_IS_BETTER = "answer_nats", False

MAIN = ("clm", "random", "student", "guided", "oracle")
WITHOUT_TEACHER = ("clm", "random", "student")
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
MORE_RATES = {"random": (3.75e-4,), "student": (3.75e-4,), "uld": (1.2e-2,)}
"""For arms whose best rate was at an end of RATES."""
EQUAL_PARTS = (8, 16, 32, 64, 128)
"""A row has 128 tokens of the student: 8 are coarse, 128 are finer than the teacher's tokens."""
QUICK = Sizes(facts=30, steps=20, teacher_steps=20, rows=2, sample_rows=2)
LAST_STEPS = 20
"""Number of steps that the losses of kept and dropped tokens are averaged over."""


@dataclass(frozen=True, kw_only=True)
class Recall(Spec):
    """A student of this experiment, with the setting that it reads and the teacher that scored it."""

    reads: Setting
    scored: str
    size: Sizes


def sizes(options: Options) -> Sizes:
    return QUICK if options.quick else Sizes()


def runs(options: Options) -> Sequence[Spec]:
    main = [Setting("random", 0.6), Setting("systematic", 0.6)]
    every, first = range(1, options.seeds + 1), range(1, 2)
    if options.quick:
        return [spec_of(main[0], arm, seed, options) for seed in first for arm in ("clm", "guided", "oracle")]
    specs = [spec_of(setting, arm, seed, options) for setting in main for seed in every for arm in MAIN]
    for share in (0.4, 0.8):
        settings = [Setting(kind, share) for kind in ("random", "systematic")]
        arms = [arm for arm in MAIN if arm != "student"]
        specs += [spec_of(setting, arm, seed, options) for setting in settings for seed in first for arm in arms]
    specs += [spec_of(Setting("random", 0.6, "gaps"), arm, seed, options) for seed in every for arm in ("clm", "guided")]
    for arm in ("clm", "guided", "guided-mean", "guided-sum"):
        specs += [spec_of(Setting("random", 0.6, "digits", "pairs"), arm, seed, options) for seed in first]
    for arm in ("keep-0.2", "keep-0.6", "keep-0.8", "unmapped-exclude", "rho1", "uld", "kld"):
        specs += [spec_of(main[0], arm, seed, options) for seed in first]
    specs += [spec_of(Setting("random", 0.0), arm, seed, options) for arm in ("clm", "uld") for seed in first]
    for arm in ("guided", "scope-sequence", "scope-global"):
        specs += [spec_of(Setting("random", 0.6, micro_batches=4), arm, seed, options) for seed in first]
    for parts in EQUAL_PARTS:
        specs += [spec_of(main[0], "equal-parts", seed, options, parts) for seed in first]
    return specs


def tuning(options: Options) -> Sequence[Spec]:
    setting = Setting("random", 0.6, world="tune")
    arms = ("clm", "guided") if options.quick else (*MAIN, "uld", "kld")
    return [spec_of(setting, arm, SEED, options, rate=rate) for arm in arms for rate in (*RATES, *MORE_RATES.get(arm, ()))]


def spec_of(
    setting: Setting, arm: str, seed: int, options: Options, equal_parts: int | None = None, rate: float | None = None
) -> Recall:
    size = sizes(options)
    files = Files(options.root, setting.world, size)
    teacher = "digits" if arm in ("rho1", "kld") else setting.teacher
    scored = "oracle" if arm == "oracle" else teacher
    overrides = [f"data.{part}={files.dataset(setting, seed, part, scored)}" for part in PARTS]
    overrides += run_overrides(size, size.steps)
    overrides += [f"eval.every={size.steps // CHECKPOINTS}", f"logging.samples={size.sample_rows}"]
    if arm not in (*WITHOUT_TEACHER, "oracle"):
        overrides += [f"teacher.path={files.teacher(teacher)}", "teacher.dtype=float32"]
    overrides += [] if equal_parts is None else [f"guidance.equal_parts={equal_parts}"]
    return Recall(
        "mechanism",
        setting.name,
        arm,
        seed,
        learning_rate("mechanism", arm) if rate is None else rate,
        tuple(overrides),
        "" if equal_parts is None else f"-{equal_parts}",
        batch_of(size, setting.micro_batches),
        reads=setting,
        scored=scored,
        size=size,
    )


def prepare(specs: Sequence[Spec], options: Options) -> None:
    """Make the teachers, then the corpora of these specs, aligned for and scored by their teachers."""
    recalls = [spec for spec in specs if isinstance(spec, Recall)]
    places = {spec.reads.world: Files(options.root, spec.reads.world, spec.size) for spec in recalls}
    for world, files in places.items():
        here = [spec for spec in recalls if spec.reads.world == world]
        names = {spec.reads.teacher for spec in here} | {spec.scored for spec in here} - {ORACLE}
        prepare_teachers(files, sorted(names), options)
    # the oracle marks datasets that the teacher of the setting has scored
    scorers = [(spec, spec.reads.teacher if spec.scored == ORACLE else spec.scored) for spec in recalls]
    wanted = dict.fromkeys((places[spec.reads.world], spec.reads, spec.seed, scorer) for spec, scorer in scorers)
    prepare_datasets(list(wanted), options.workers)
    for spec in recalls:
        if spec.scored == ORACLE:
            for part in PARTS:
                write_oracle_of(places[spec.reads.world], spec.reads, spec.seed, part)


def words(options: Options) -> dict[str, str]:
    size = sizes(options)
    teacher = f"{size.teacher_steps} steps of the same model"
    return {"teacher": teacher, "lines": f"{size.lines(size.steps):,}", "facts": f"{size.facts}", "steps": f"{size.steps:,}"}


def score(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Scores on the facts and on the sample rows.

    accuracy     share of the values that greedy decoding gets exactly right
    distracted   share of the facts that get the wrong value that the corpus repeats
    answer_nats  mean loss on the tokens of the right values
    sureness     mean probability of the most likely token at the positions of a value
    """
    spec = run.spec
    assert isinstance(spec, Recall)
    files = Files(run.root, spec.reads.world, spec.size)
    known = known_facts(spec.reads.world, spec.size.facts)
    tokenizer = open_tokenizer(files.tokenizer(spec.reads.student))
    lines = task.load_corpus(files.corpus(spec.reads, spec.seed, "valid"))
    kept = shares_kept(run.output, lambda document: kinds(lines[document], tokenizer))
    fixed = dict(zip(("IoS", "IoU"), measured_overlap(run.output), strict=True)) if spec.arm in ("equal-parts", "guided") else {}
    for step, checkpoint in run.checkpoints():
        recalled = recall(open_student(checkpoint), tokenizer, known)
        right = np.array([found.said == fact.value for found, fact in zip(recalled, known, strict=True)])
        scores = {
            "accuracy": float(right.mean()),
            "answer_nats": float(np.mean([found.nats for found in recalled])),
            "sureness": float(np.mean([found.sureness for found in recalled])),
            "distracted": float(np.mean([found.said == fact.distractor for found, fact in zip(recalled, known, strict=True)])),
        }
        if spec.reads.teacher == "gaps":
            knowledge = np.array([knows(i) for i in range(len(known))])
            scores |= {f"accuracy_{kind}": float(right[knowledge == kind].mean()) for kind in ("known", "ignorant", "mistaken")}
            scores["believes_mistake"] = float(
                np.mean([found.said == fact.mistake for found, fact in zip(recalled, known, strict=True)])
            )
        yield step, scores | kept[step] | fixed | losses_of(run.output, step)


def kinds(line: task.Line, tokenizer: Tokenizer) -> NDArray[np.str_]:
    """[N] the kind of each token of a line: `clean` or `wrong` for its value, else `key`, `sign` or `end`."""
    tokens = tokenizer.encode(line.text).tokens
    said = "wrong" if line.wrong else "clean"
    parts = zip(tokens, task.answer_tokens(tokens), strict=True)
    return np.array([*(said if answer else "key" if token.isdigit() else "sign" for token, answer in parts), "end"])


def losses_of(output: Path, step: int) -> dict[str, float]:
    """The student's mean loss on kept and on dropped tokens, over the training steps before `step`."""
    lines = [line for line in read_metrics(output) if step - LAST_STEPS < line["step"] <= step]
    names = {f"loss_{which}": f"guidance/student_loss_{which}" for which in ("kept", "dropped")}
    return {
        name: float(np.mean([line[metric] for line in lines if metric in line]))
        for name, metric in names.items()
        if any(metric in line for line in lines)
    }
