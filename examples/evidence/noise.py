"""Experiment 2, noise in real text: half of the tokens are junk. How much junk is kept, and which arm learns more of the text?

A student of one million parameters learns mathematical docstrings and problems from scratch, with junk between their words. The
teacher, SmolLM2-135M-Instruct, read the same noisy text once. A seed determines the student's initial weights, the order, the
documents and their junk. The scores are bits per byte of clean text from files that no student has read, and the shares that the
rule would keep of noisy text from such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.evidence.held_out import HeldOut
from examples.evidence.junk import JUNK, Kind, Labels
from examples.evidence.learning_rates import SEED, learning_rate
from examples.evidence.noisy_text import TextSet, labels_of, prepare_sets
from examples.evidence.running import Options, Run, Spec, has_teacher
from examples.evidence.smollm2 import teacher
from examples.evidence.students import open_student
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.training.sample_files import SampleRows, SampleStep, read_rows, read_steps

JUDGE, HIGHER_IS_BETTER = "bits_per_byte", False

ARMS = ("clm", "random", "random-0.6", "student", "guided", "keep-0.6", "oracle")
"""Names as in the tables. random-0.6 keeps the same share as keep-0.6."""
SETTING, TUNING = "half-junk", "tune-half-junk"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
ROW, ROWS_A_STEP, STEPS, QUICK_STEPS, CHECKPOINTS, SAMPLE_ROWS = 256, 2, 320, 8, 4, 40
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


# ---- the runs


def runs(options: Options) -> Sequence[Spec]:
    arms = ("clm", "guided") if options.quick else ARMS
    return [spec_of(SETTING, arm, seed, learning_rate("noise", arm), options) for seed in seeds_of(options) for arm in arms]


def seeds_of(options: Options) -> range:
    return range(1, 2 if options.quick else options.seeds + 1)


def tuning(options: Options) -> Sequence[Spec]:
    return [spec_of(TUNING, arm, SEED, rate, options) for arm in ARMS for rate in RATES]


def spec_of(setting: str, name: str, seed: int, rate: float, options: Options) -> Spec:
    arm, variant = ("random", "-0.6") if name == "random-0.6" else (name, "")
    steps = QUICK_STEPS if options.quick else STEPS
    every = steps // CHECKPOINTS
    train, valid = (TextSet.named(name, options) for name in (f"train-{seed}", f"noisy-{held_out_part(setting)}"))
    overrides = [
        f"data.train={train.oracle if arm == 'oracle' else train.dataset}",
        f"data.valid={valid.oracle if arm == 'oracle' else valid.dataset}",
        f"data.row_length={ROW}",
        f"student.config={{{', '.join(f'{name} = {json.dumps(value)}' for name, value in MODEL.items())}}}",
        f"training.steps={steps}",
        f"training.schedule.warmup_steps={steps // 10}",
        f"eval.every={every}",
        f"eval.rows={ROWS_A_STEP}",
        f"checkpoint.every={every}",
        f"checkpoint.keep_every={every}",
        f"logging.every={every}",
        f"logging.samples={SAMPLE_ROWS}",
    ]
    if has_teacher(arm) and arm != "oracle":
        overrides.append(f"teacher.path={teacher(options.root)}")
    if variant:
        overrides.append("guidance.keep=0.6")
    batch = {"train_batch_size": ROWS_A_STEP, "train_micro_batch_size_per_gpu": ROWS_A_STEP}
    return Spec("noise", setting, arm, seed, rate, tuple(overrides), variant, batch)


def held_out_part(setting: str) -> str:
    return "tune" if setting == TUNING else "test"


def prepare(specs: Sequence[Spec], options: Options) -> None:
    parts = sorted({held_out_part(spec.setting) for spec in specs})
    seeds = sorted({spec.seed for spec in specs})
    held_out = [f"{kind}-{part}" for kind in ("noisy", "clean") for part in parts]
    prepare_sets([*(f"train-{seed}" for seed in seeds), *held_out], options)


def words(options: Options) -> dict[str, str]:
    """Counts of the texts that the students read."""
    sets = [TextSet.named(f"train-{seed}", options) for seed in seeds_of(options)]
    count = np.sum([np.bincount(labels_of_set(texts), minlength=len(Kind)) for texts in sets], axis=0)
    share = count / count[: Kind.MIXED].sum()
    documents = [len(texts.read()) for texts in sets]
    clean = HeldOut.of(TextSet.named("clean-test", options).dataset, ROW)
    return {
        "documents": f"{min(documents)} to {max(documents)}",
        "tokens": f"{count.sum() / len(sets):,.0f}",
        "steps": str(QUICK_STEPS if options.quick else STEPS),
        "step_tokens": f"{ROWS_A_STEP * ROW:,}",
        "held_out": f"{clean.text_RS.sum():,}",
        **{kind.name.lower(): f"{share[kind]:.0%}" for kind in (Kind.CLEAN, *JUNK)},
    }


# ---- the scores


def score(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """bits_per_byte of clean text and of its easy and hard halves; kept shares of noisy text, and losses."""
    rows, looks = read_rows(run.output), {look.step: look for look in read_steps(run.output)}
    noisy = TextSet(Path(rows.dataset).parent)
    label_RS = labels_of_samples(rows, noisy)
    clean = HeldOut.of(TextSet(noisy.folder.with_name(f"clean-{held_out_part(run.spec.setting)}")).dataset, ROW)
    for step, checkpoint in run.checkpoints():
        yield step, clean.scores(open_student(checkpoint)) | noise_scores(rows, looks[step], label_RS)


def labels_of_samples(rows: SampleRows, texts: TextSet) -> Labels:
    """[R, S] the Kind of each target, or MIXED if it has none."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(AlignedDataset.open(texts.dataset).student_lengths)])
    flat = np.append(labels_of_set(texts), np.uint8(Kind.MIXED))
    label_RS: Labels = flat[np.where(rows.valid_RS, starts[rows.document_RS] + rows.token_RS, len(flat) - 1)]
    return label_RS


def labels_of_set(texts: TextSet) -> Labels:
    """[N] the Kind of the student's tokens of all documents, concatenated."""
    data = AlignedDataset.open(texts.dataset)
    return np.concatenate([labels_of(text, i, data, "student") for i, text in enumerate(texts.read())])


def noise_scores(rows: SampleRows, look: SampleStep, label_RS: Labels) -> dict[str, float]:
    """Scores over the mapped tokens of noisy text. A score without tokens is absent.

    kept_KIND        the share that the rule would keep
    enrichment_KIND  the kept share of clean tokens divided by the kept share of this junk
    loss_KIND        the student's mean loss, nats; also of `kept` and `dropped` tokens
    """
    kept_RS = look.weight_RS > 0
    known_RS = rows.mapped_RS & (label_RS != Kind.MIXED)
    kinds = {kind.name.lower(): label_RS == kind for kind in (Kind.CLEAN, *JUNK)} | {"junk": label_RS != Kind.CLEAN}
    groups = {name: known_RS & of_RS for name, of_RS in kinds.items()}
    kept = {name: float(kept_RS[group_RS].mean()) for name, group_RS in groups.items() if group_RS.any()}
    scores = {f"kept_{name}": share for name, share in kept.items()}
    scores |= {f"enrichment_{name}": kept["clean"] / share for name, share in kept.items() if name != "clean" and share}
    groups |= {"kept": known_RS & kept_RS, "dropped": known_RS & ~kept_RS}
    losses = {name: look.student_loss_RS[group_RS] for name, group_RS in groups.items() if group_RS.any()}
    return scores | {f"loss_{name}": float(nats.mean(dtype=np.float64)) for name, nats in losses.items()}
