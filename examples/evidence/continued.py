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

from examples.evidence import gemma, smollm2, warm_student
from examples.evidence.corpus import Domain, Part, write_corpus
from examples.evidence.costs import parameters
from examples.evidence.held_out import HeldOut
from examples.evidence.jobs import Job, work
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.mixture import DOMAINS, END, SHARES, WRONG, Texts, kinds_in, kinds_of, make
from examples.evidence.problems import invent_problems
from examples.evidence.quiz import OPERATIONS, Quiz
from examples.evidence.running import Options, Run, Spec, has_teacher
from examples.evidence.students import open_student
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.training.sample_files import read_rows, read_steps

JUDGE, HIGHER_IS_BETTER = "bits_per_byte", False

MAIN = ("clm", "random", "student", "guided")
VARIANTS = ("keep-0.6",)
"""Variants of the method, at the first seed only, like the oracle. Aggregates are equal here, because 99 % of the student's
tokens are inside one teacher token."""
SETTING, TUNING = "mixture", "tune-mixture"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
ROW, ROWS_A_STEP, STEPS, CHECKPOINTS, SAMPLE_ROWS = 256, 4, 200, 4, 40
STEPS_OF_SMOLLM2 = 240
"""A run takes about 50 minutes of one core."""
PROBLEMS = 200
"""Problems per test."""


OTHER, LONG, SMOLLM2 = "-other", "-long", "-smollm2"
"""In the name of a setting: other texts, a student that was trained for longer, and SmolLM2 as the student of Gemma."""


@dataclass(frozen=True)
class Files:
    """Paths of the prepared files of a setting."""

    folder: Path
    """Folder of the texts."""
    start: Path
    """Folder of the initial student."""

    @classmethod
    def of(cls, root: Path, setting: str, quick: bool = False) -> Files:
        folder = root / "data" / ("continued-quick" if quick else "continued")
        if SMOLLM2 in setting:
            folder = folder.with_name(folder.name + SMOLLM2)
        start = folder / ("student-long" if LONG in setting else "student")
        return cls(folder.with_name(folder.name + OTHER) if OTHER in setting else folder, start)

    @property
    def other(self) -> bool:
        return self.folder.name.endswith(OTHER)

    @property
    def teacher(self) -> Path:
        root = self.folder.parents[1]
        return gemma.teacher(root) if self.folder.name.endswith(SMOLLM2) else smollm2.teacher(root)

    @property
    def student(self) -> Path:
        return self.start / "model"

    @property
    def tokenizer(self) -> Path:
        return self.start.with_name("student") / "tokenizer"

    def texts(self, name: str) -> Texts:
        return Texts(self.folder / name)

    def begin(self, part: Part) -> Path:
        return self.folder / f"begin-{self.start.name}-{part}.json"


# ---- the runs


def runs(options: Options) -> Sequence[Spec]:
    arms: Sequence[str] = ("clm", "guided") if options.quick else MAIN
    seeds = [1] if options.quick else range(1, options.seeds + 1)
    chosen = [(arm, seed) for seed in seeds for arm in arms]
    if not options.quick:
        chosen += [(arm, 1) for arm in (*VARIANTS, "oracle")]
    return [spec_of("continued", SETTING, arm, seed, learning_rate("continued", arm), options) for arm, seed in chosen]


def tuning(options: Options) -> Sequence[Spec]:
    arms = (*MAIN, *VARIANTS, "oracle")
    return [spec_of("continued", TUNING, arm, SEED, rate, options) for arm in arms for rate in RATES]


def spec_of(experiment: str, setting: str, arm: str, seed: int, rate: float, options: Options, *more: str) -> Spec:
    """more: fields that change the arm, for example `guidance.keep=0.8`."""
    files, steps = Files.of(options.root, setting, options.quick), steps_of(options, setting)
    every = steps // CHECKPOINTS
    data = {"oracle": "oracle", "constant-variate": "constant"}.get(arm, "dataset")
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
    if data == "dataset" and has_teacher(arm):
        overrides.append(f"teacher.path={files.teacher}")
    batch = {"train_batch_size": ROWS_A_STEP, "train_micro_batch_size_per_gpu": ROWS_A_STEP}
    if SMOLLM2 not in setting:  # whose matrices are slower in bfloat16 on a CPU without AMX
        batch |= warm_student.BF16
    variant = "".join(f"-{field.partition('=')[2]}" for field in more)
    return Spec(experiment, setting, arm, seed, rate, (*overrides, *more), variant, batch)


def steps_of(options: Options, setting: str = SETTING) -> int:
    if options.quick:
        return 8
    return STEPS_OF_SMOLLM2 if SMOLLM2 in setting else STEPS


def part_of(setting: str) -> Part:
    return "tune" if setting.startswith("tune") else "test"


def prepare(specs: Sequence[Spec], options: Options) -> None:
    """Make the corpus, the teacher, the initial student, and the texts of these specs, aligned and scored."""
    corpus, logs = options.root / "corpus", options.root / "data"
    first = [
        Job("corpus", logs / "corpus.log", partial(write_corpus, corpus, list(DOMAINS))),
        Job("teacher", logs / "teacher.log", partial(smollm2.write_teacher, options.root)),
    ]
    work(first, options.workers)
    for setting in dict.fromkeys(spec.setting for spec in specs):
        prepare_setting(setting, corpus, options)


def prepare_setting(setting: str, corpus: Path, options: Options) -> None:
    files, part = Files.of(options.root, setting, options.quick), part_of(setting)
    if SMOLLM2 in setting:
        work([Job("gemma", files.folder / "gemma.log", partial(gemma.write_teacher, options.root))], 1)
        smollm2.link_student(options.root, files.student, files.tokenizer)
    else:
        # the first student's tokenizer is that of all texts
        for start in dict.fromkeys([files.start.with_name("student"), files.start]):
            times = warm_student.LONG if start.name.endswith(LONG) else 1
            warm_student.prepare(start, corpus, files.teacher, options.workers, options.quick, times)
    names = [f"train-{source}" for source in SHARES] + [f"{one}-{part}" for one in ("mixed", *DOMAINS)]
    all_texts = [files.texts(name) for name in names]
    missing = [texts for texts in all_texts if not (texts.whole.exists() and texts.constant.exists())]
    divisor, number = 20 if options.quick else 1, int(OTHER in setting)
    work(
        [
            Job(
                texts.folder.name,
                files.folder / f"{texts.folder.name}.log",
                partial(make, texts, corpus, files.tokenizer, files.teacher, divisor, number),
            )
            for texts in missing
        ],
        options.workers,
    )
    if not (begin := files.begin(part)).exists():
        work([Job(begin.stem, begin.with_suffix(".log"), partial(judge_begin, files, part))], 1)


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
        problems = invent_problems(PROBLEMS, part, seed=3 if files.other else 1)
        return cls(texts, Quiz.of(problems, tokenizer, data.eos_id, byte_lengths))

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
    setting, quick = run.spec.setting, valid.parents[1].name.startswith("continued-quick")
    files, part = Files.of(run.root, setting, quick), part_of(setting)
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
    files = Files.of(options.root, SETTING, options.quick)
    tokens, looks = warm_student.flatness(files.start)
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
