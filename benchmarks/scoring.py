"""Measure offline scoring relative to the teacher's bare forwards, and the rate at which cached losses are read.

    python -m benchmarks.scoring [--write] [--teacher FOLDER_OR_GGUF] [--rounds N] [--quick]

The goals are:

- Scoring reaches at least 0.95 × the tokens per second of a bare forward over perfectly packed batches. The bare forward uses
  the same teacher, rows of N real tokens without padding, as many rows as the budget allows, and drops the losses. Scoring is
  `score_shard`, from ids on disk to losses on disk, for documents that fit into a window. (Longer documents are read up to
  twice. That share is estimated.)
- Rows of 2,048 with cached losses, from one teacher and from two combined teachers, are read at 5 M student tokens per
  CPU-second. For example, a GPU that learns 37,000 tokens per second then waits 0.7 % of its time for one core.

The documents are Python's manual and the multilingual texts of the tests, at their original lengths. By default, the teacher is
a random Llama of 4 layers, d = 256, 49,152 tokens, float32. Times are CPU time on one thread. The arms take turns, and a ratio
is the median of the rounds' ratios. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.page import GOALS, Figure, circumstances, markdown, show, write_section
from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherSource
from megatron_vocagno.command import Parser, positive_int, run_command
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.losses import LOSS_RECORD, gather, record_losses, write_losses
from megatron_vocagno.corpus.manifest import LossTotals, Scoring
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.model.folder import quiet
from megatron_vocagno.preprocess.score import ScoringOptions
from megatron_vocagno.preprocess.score_local import open_once
from megatron_vocagno.preprocess.score_shard import ScoreJob, score_shard
from megatron_vocagno.preprocess.windows import plan_windows
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset, invent_dataset

CONTEXT, BUDGET = 1024, 4096
LEAST_RATIO, LEAST_TOKENS = 0.95, 5e6
ROW, ROWS = 2048, 512


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.scoring",
        "",
        "Measure scoring relative to the teacher's bare forwards, and the rate at which cached losses are read.",
        "python -m benchmarks.scoring --write",
        GOALS,
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--teacher", type=Path, metavar="PATH", help="a model with SmolLM2's tokenizer (default: random weights)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="timed turns (default: 5)")
    parser.add_argument("--quick", action="store_true", help="few documents: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        figures = [
            *scoring_figures(Path(folder), args.teacher, args.rounds, args.quick),
            *reading_figures(Path(folder), args.quick),
        ]
    show(figures)
    if args.write:
        head = f"`python -m benchmarks.scoring`, {circumstances('torch', 'numpy')}\n\n"
        write_section("scoring", head + markdown(figures))
    return int(any(figure.met is False for figure in figures))


# ---- scoring


def scoring_figures(folder: Path, path: Path | None, rounds: int, quick: bool) -> list[Figure]:
    tokenizer = real.smollm2_tokenizer_folder(folder / "tokenizer")
    if path is None:
        path = random_teacher(folder / "teacher")
    texts = [text for text in real.texts()[:60] + real.multilingual_texts() if len(text) < 3 * CONTEXT][: 12 if quick else None]
    data = build_dataset(folder / "documents", texts, real.mistral_tokenizer_path(), tokenizer)
    asked = ScoringOptions(path, "float32", context=CONTEXT, tokens_per_batch=BUDGET)
    [shard] = data.manifest.shards
    assert int(data.teacher_lengths.max()) <= CONTEXT, "a document does not fit into a window"
    job = ScoreJob(0, data.path / shard.path, shard, asked.scoring(data), path, BUDGET)
    teacher = open_once(path, "float32", "none")
    ids = torch.from_numpy(np.concatenate([data.teacher(i) for i in range(len(data))])).long()
    packed = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT).split(BUDGET // CONTEXT)
    totals = LossTotals()

    def ours() -> None:
        nonlocal totals
        (job.folder / LOSS_RECORD).unlink(missing_ok=True)
        totals = score_shard(job).losses.totals

    def bare() -> None:
        for rows in packed:
            teacher.loss(rows, rows)

    ratios, rates = [], []
    for round_ in range(1 + rounds):
        arms = {"ours": (ours, len(ids)), "bare": (bare, sum(rows.numel() for rows in packed))}
        order = list(arms) if round_ % 2 else list(arms)[::-1]
        rate = {name: arms[name][1] / cpu_seconds(arms[name][0]) for name in order}
        if round_:  # the first round is a warm-up
            ratios.append(rate["ours"] / rate["bare"])
            rates.append(rate["ours"])
    ratio = median(ratios)
    return [
        Figure("teacher", f"{path.name if path.suffix else 'random Llama'}, {teacher.parameters_count / 1e6:.1f} M parameters"),
        Figure(
            f"tokens per CPU-second for {len(data)} documents (median {int(np.median(data.teacher_lengths))} tokens), "
            f"relative to a bare forward over full rows of {CONTEXT:,}",
            f"{ratio:.2f} × (rounds {min(ratios):.2f} to {max(ratios):.2f}; {median(rates):,.0f} per second)",
            f"≥ {LEAST_RATIO} ×",
            ratio >= LEAST_RATIO,
        ),
        Figure(
            f"padding for these {len(ids):,} tokens, with {BUDGET:,} positions per forward",
            f"{totals.padding / totals.positions:.1%}",
        ),
        *read_again(),
    ]


def read_again() -> list[Figure]:
    """Estimate the share of tokens that are read twice, for documents of lognormal length with a mean of 2,000 tokens."""
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(np.log(2000) - 1.1**2 / 2, 1.1, 100_000)).astype(np.int64)
    shares = []
    for context in (2048, 4096, 8192):
        positions = int(plan_windows(lengths, context, context // 2).widths.sum())
        shares.append(f"{positions / int(lengths.sum()) - 1:.0%} at N = {context:,}")
    return [Figure("tokens read again as context (estimated: lognormal lengths, mean 2,000, M = N / 2)", ", ".join(shares))]


def random_teacher(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# ---- reading


def reading_figures(folder: Path, quick: bool) -> list[Figure]:
    student = open_tokenizer(real.mistral_tokenizer_path())
    teacher = open_tokenizer(folder / "tokenizer")
    random = np.random.default_rng(0)
    shards = [np.maximum(4, random.lognormal(6.9, 1.0, 100 if quick else 1250)).astype(int).tolist() for _ in range(4)]
    data = with_losses(invent_dataset(folder / "read", student, teacher, shards))
    one = CachedLosses(data)
    sources: dict[str, TeacherSource | None] = {
        "with ids to score": None,
        "with cached losses": one,
        "with the guides of two teachers": CombinedGuides([one, CachedLosses(data)], "max", "min"),
    }
    figures = []
    for name, source in sources.items():
        rows = TrainRows(data, ROW, 0, source)
        batches = Batches(rows, Layout(micro_batch_rows=8, micro_batches=4, data_parallel=1), rank=0)

        def read(batches: Batches = batches) -> None:
            for begin in range(0, 64 if quick else ROWS, batches.layout.rows):
                batches.step(begin)

        count = (64 if quick else ROWS) * rows.tokens_per_row
        rate = max(count / cpu_seconds(read) for _ in range(3))
        figures.append(
            Figure(f"student tokens per CPU-second, rows of {ROW:,} {name}", f"{rate / 1e6:.1f} M", "≥ 5 M", rate >= LEAST_TOKENS)
        )
    return figures


def with_losses(data: AlignedDataset) -> AlignedDataset:
    """Write random losses into a dataset, and open it again."""
    scoring = Scoring(teacher="0" * 64, name="nobody", dtype="float32", weights="as-is", context=1, stride=1, before=0)
    random = np.random.default_rng(0)
    first = 0
    for shard in data.manifest.shards:
        lengths = data.teacher_lengths[first : first + shard.totals.documents].astype(np.int64)
        losses = random.gamma(1, 2, int(lengths.sum())).astype(np.float16)
        write_losses(data.path / shard.path, shard, scoring, losses, lengths, LossTotals())
        first += shard.totals.documents
    record_losses(data.path, data.manifest, gather(data.path, data.manifest.shards))
    return AlignedDataset.open(data.path)


def cpu_seconds(what: Callable[[], None]) -> float:
    begin = time.process_time()
    what()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
