"""Experiment 3, continued pretraining: a student at the end of its schedule continues with a mixture.

The initial student has learned general text (`warm_student`). The mixture has mathematics, word problems of which three in ten
have a wrong result, and program code with junk between its words (`mixture`). The teacher, SmolLM2-135M-Instruct, read it once.
The scores are bits per byte of clean text of other files, by domain, losses and accuracy on problems that are not in the mixture,
and the shares that the rule would keep of a mixture of other files. A seed determines the order of rows and the draws of
`random`. Texts, noise and the initial student are the same for all seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.evidence import smollm2, warm_student
from examples.evidence.corpus import Domain, Part, write_corpus
from examples.evidence.costs import parameters
from examples.evidence.held_out import HeldOut
from examples.evidence.jobs import Job, work
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.mixture import DOMAINS, END, SHARES, WRONG, Texts, kinds_in, kinds_of, make
from examples.evidence.problems import invent_problems
from examples.evidence.quiz import OPERATIONS, Quiz
from examples.evidence.running import Options, Run, Spec
from examples.evidence.students import open_student
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.training.sample_files import read_rows, read_steps

JUDGE, HIGHER_IS_BETTER = "bits_per_byte", False

MAIN = ("clm", "random", "student", "guided")
VARIANTS = ("keep-0.6",)
"""Variants of the method, at the first seed only, like the oracle. Aggregates are equal here, because 99 % of the student's
tokens are inside one teacher token."""
GUIDED = ("guided", *VARIANTS)
SETTING, TUNING = "mixture", "tune-mixture"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
ROW, ROWS_A_STEP, STEPS, CHECKPOINTS, SAMPLE_ROWS = 256, 4, 200, 4, 40
PROBLEMS = 200
"""Problems per test."""


@dataclass(frozen=True)
class Files:
    """Paths of the prepared files."""

    folder: Path

    @classmethod
    def of(cls, options: Options) -> Files:
        return cls(options.root / "data" / ("continued-quick" if options.quick else "continued"))

    @property
    def student(self) -> Path:
        return self.folder / "student" / "model"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "student" / "tokenizer"

    def texts(self, name: str) -> Texts:
        return Texts(self.folder / name)

    def begin(self, part: Part) -> Path:
        return self.folder / f"begin-{part}.json"


# ---- the runs


def runs(options: Options) -> Sequence[Spec]:
    arms: Sequence[str] = ("clm", "guided") if options.quick else MAIN
    seeds = [1] if options.quick else range(1, options.seeds + 1)
    specs = [spec_of(SETTING, arm, seed, learning_rate("continued", arm), options) for seed in seeds for arm in arms]
    if not options.quick:
        specs += [spec_of(SETTING, arm, 1, learning_rate("continued", arm), options) for arm in (*VARIANTS, "oracle")]
    return specs


def tuning(options: Options) -> Sequence[Spec]:
    return [spec_of(TUNING, arm, SEED, rate, options) for arm in (*MAIN, *VARIANTS, "oracle") for rate in RATES]


def spec_of(setting: str, arm: str, seed: int, rate: float, options: Options) -> Spec:
    files, steps = Files.of(options), steps_of(options)
    every = steps // CHECKPOINTS
    data = "oracle" if arm == "oracle" else "dataset"
    blend = [
        f"{{path = {json.dumps(str(files.folder / f'train-{source}' / data))}, weight = {share}}}"
        for source, share in SHARES.items()
    ]
    overrides = [
        f"data.train=[{', '.join(blend)}]",
        f"data.valid={files.folder / f'mixed-{part_of(setting)}' / data}",
        f"data.row_length={ROW}",
        f"student.pretrained={files.student}",
        f"training.steps={steps}",
        f"training.schedule.warmup_steps={steps // 10}",
        f"eval.every={every}",
        f"eval.rows={ROWS_A_STEP}",
        f"checkpoint.every={every}",
        f"checkpoint.keep_every={every}",
        f"logging.every={every}",
        f"logging.samples={SAMPLE_ROWS}",
    ]
    if arm in GUIDED:
        overrides.append(f"teacher.path={smollm2.teacher(options.root)}")
    batch = {"train_batch_size": ROWS_A_STEP, "train_micro_batch_size_per_gpu": ROWS_A_STEP} | warm_student.BF16
    return Spec("continued", setting, arm, seed, rate, tuple(overrides), batch=batch)


def steps_of(options: Options) -> int:
    return 8 if options.quick else STEPS


def part_of(setting: str) -> Part:
    return "tune" if setting == TUNING else "test"


def prepare(specs: Sequence[Spec], options: Options) -> None:
    """Make the corpus, the teacher, the initial student, and the texts of these specs, aligned and scored."""
    files, corpus, logs = Files.of(options), options.root / "corpus", options.root / "data"
    first = [
        Job("corpus", logs / "corpus.log", partial(write_corpus, corpus, list(DOMAINS))),
        Job("teacher", logs / "teacher.log", partial(smollm2.write_teacher, options.root)),
    ]
    work(first, options.workers)
    teacher = smollm2.teacher(options.root)
    warm_student.prepare(files.student.parent, corpus, teacher, options.workers, options.quick)
    parts = sorted({part_of(spec.setting) for spec in specs})
    names = [f"train-{source}" for source in SHARES] + [f"{one}-{part}" for part in parts for one in ("mixed", *DOMAINS)]
    missing = [files.texts(name) for name in names if not files.texts(name).whole.exists()]
    divisor = 20 if options.quick else 1
    work(
        [
            Job(
                texts.folder.name,
                files.folder / f"{texts.folder.name}.log",
                partial(make, texts, corpus, files.tokenizer, teacher, divisor),
            )
            for texts in missing
        ],
        options.workers,
    )
    unjudged = [part for part in parts if not files.begin(part).exists()]
    work([Job(f"begin-{part}", files.folder / f"begin-{part}.log", partial(judge_begin, files, part)) for part in unjudged], 1)


# ---- the scores


@dataclass(frozen=True)
class Judges:
    """All tests of a student."""

    texts: dict[Domain, HeldOut]
    quiz: Quiz

    @classmethod
    def of(cls, files: Files, part: Part) -> Judges:
        texts = {domain: HeldOut.of(files.texts(f"{domain}-{part}").dataset, ROW) for domain in DOMAINS}
        data = AlignedDataset.open(files.texts(f"mixed-{part}").dataset).student_tokenizer
        tokenizer: Tokenizer = Tokenizer.from_file(str(data.path / "tokenizer.json"))
        byte_lengths = np.load(data.path / "byte_lengths.npy")
        return cls(texts, Quiz.of(invent_problems(PROBLEMS, part, seed=1), tokenizer, data.eos_id, byte_lengths))

    def scores(self, student: PreTrainedModel) -> dict[str, float]:
        """Bits per byte as DOMAIN, DOMAIN_easy, DOMAIN_hard and JUDGE (mathematics), and the scores of the problems."""
        scores = {
            domain + name.removeprefix(JUDGE): value
            for domain, held_out in self.texts.items()
            for name, value in held_out.scores(student).items()
        }
        return scores | {JUDGE: scores["mathematics"]} | self.quiz.scores(student)


def judge_begin(files: Files, part: Part) -> None:
    """Score the student before the first step. Runs in its own process."""
    student = AutoModelForCausalLM.from_pretrained(files.student, dtype=torch.float32).eval()
    files.begin(part).write_text(json.dumps(Judges.of(files, part).scores(student), indent=1), encoding="utf-8")


def score(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """The scores at each checkpoint and before the first step, and the kept shares of the mixture."""
    valid = Path(read_rows(run.output).dataset)
    files, part = Files(valid.parents[1]), part_of(run.spec.setting)
    of_mixture = mixture_scores(run.output, kinds_in(Texts(valid.parent)))
    yield 0, json.loads(files.begin(part).read_text(encoding="utf-8")) | of_mixture[0]
    judges = Judges.of(files, part)
    for step, checkpoint in run.checkpoints():
        yield step, judges.scores(open_student(checkpoint)) | of_mixture[step]


def mixture_scores(output: Path, kinds: Callable[[int], NDArray[np.str_]]) -> dict[int, dict[str, float]]:
    """Scores over the mapped tokens of the sample rows, by step. A score without tokens is absent.

    kept_KIND             the share that the rule would keep
    loss_KIND, guide_KIND mean losses of student and teacher, nats; also loss_kept, loss_dropped
    kinds                 function from the number of a document of data.valid to the [N] kinds of its student tokens
    """
    rows = read_rows(output)
    of_document = {int(number): kinds(int(number)) for number in np.unique(rows.document_RS[rows.valid_RS])}
    kind_RS = np.full(rows.document_RS.shape, END, dtype="U16")
    for place in zip(*np.nonzero(rows.valid_RS), strict=True):
        kind_RS[place] = of_document[int(rows.document_RS[place])][rows.token_RS[place]]
    found: dict[int, dict[str, float]] = {}
    for look in read_steps(output):
        kept_RS = look.weight_RS > 0
        groups = {str(kind): rows.mapped_RS & (kind_RS == kind) for kind in np.unique(kind_RS[rows.mapped_RS])}
        scores = {f"kept_{kind}": float(kept_RS[group_RS].mean()) for kind, group_RS in groups.items()}
        if np.isfinite(look.guide_RS).any():
            scores |= {f"guide_{kind}": _mean(look.guide_RS[group_RS]) for kind, group_RS in groups.items()}
        groups |= {"kept": rows.mapped_RS & kept_RS, "dropped": rows.mapped_RS & ~kept_RS}
        scores |= {f"loss_{kind}": _mean(look.student_loss_RS[group_RS]) for kind, group_RS in groups.items() if group_RS.any()}
        found[look.step] = scores
    return found


def _mean(nats: NDArray[np.float32]) -> float:
    return float(nats.mean(dtype=np.float64))


def words(options: Options) -> dict[str, str]:
    files = Files.of(options)
    tokens, looks = warm_student.flatness(files.student.parent)
    train = {source: AlignedDataset.open(files.texts(f"train-{source}").dataset).totals for source in SHARES}
    knows = teacher_on_results(files.texts("train-problems"))
    return {
        "parameters": f"{parameters(files.student) / 1e6:.1f}",
        "warm_tokens": f"{tokens / 1e6:.1f}",
        "warm_looks": ", ".join(f"{look:.3f}" for look in looks),
        "steps": f"{steps_of(options):,}",
        "step_tokens": f"{ROWS_A_STEP * ROW:,}",
        "problems": f"{PROBLEMS:,}",
        "wrong": f"{WRONG:.0%}".replace("%", " %"),
        "teacher_right": ", ".join(f"{knows[operation]:.2f}" for operation in OPERATIONS),
        "teacher_wrong": f"{knows['wrong']:.2f}",
    } | {f"{source}_tokens": f"{totals.student_tokens:,}" for source, totals in train.items()}


def teacher_on_results(problems: Texts) -> dict[str, float]:
    """The teacher's mean loss per digit, nats: on right results by operation, and on all `wrong` ones."""
    data = AlignedDataset.open(problems.dataset)
    losses: dict[str, list[float]] = defaultdict(list)
    for document, text in enumerate(problems.read()):
        kinds = kinds_of(text, data.teacher(document), data.teacher_byte_lengths)
        operation = text.text.rpartition("Answer: ")[2].split()[1]
        for kind, name in (("result", operation), ("wrong", "wrong")):
            losses[name] += data.teacher_losses(document)[kinds == kind].tolist()
    return {name: float(np.mean(nats)) for name, nats in losses.items()}
