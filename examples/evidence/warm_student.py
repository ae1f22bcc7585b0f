"""The initial student of all arms of the third experiment: five million parameters, trained by plain language modeling to the end
of a cosine schedule to zero, when its loss is flat.

    ROOT/data/continued/student/tokenizer/   2,048 byte-level tokens, one for each digit
    ROOT/data/continued/student/general/     a dataset of general text; test/ is the same from other files
    ROOT/data/continued/student/run/         its training, each token read about twice
    ROOT/data/continued/student/model/       the Hugging Face folder
    ROOT/data/continued/student-long/        a student that was trained LONG times as long

It is the longest part, so two data-parallel ranks share it if there are two workers. The rows of a step are the same.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo.corpus import Text
from examples.evidence import smollm2
from examples.evidence.corpus import read_part
from examples.evidence.jobs import Job, work
from examples.evidence.running import ARMS, SETTINGS
from megatron_vocagno.export import export
from megatron_vocagno.pretrain import main
from megatron_vocagno.training.monitor import FINISHED_FILE, read_metrics
from tools.preprocess import build_dataset

MODEL = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
VOCABULARY, EOS = 2_048, "<eos>"
ROW, ROWS_OF_A_RANK, ROWS_A_STEP = 256, 8, 16
STEPS, LONG = 1_230, 3
LEARNING_RATE = 2e-3
LOOKS = 10
TEST_DOCUMENTS, TEST_ROWS = 100, 80
BF16: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
"""Replaces fields of settings.json. Takes half the time of float32."""


def prepare(folder: Path, corpus: Path, teacher: Path, workers: int, quick: bool, times: int = 1) -> None:
    """Make the missing files.

    times    factor of the number of steps
    corpus   a folder with the domain `software`
    teacher  datasets are always aligned for a teacher, although plain training does not read its side
    """
    if (folder / "model" / "config.json").exists():
        return
    work([Job("general text", folder / "general.log", partial(make_data, folder, corpus, teacher))], workers)
    if not (folder / "run" / FINISHED_FILE).exists():
        ranks, arguments, port = min(workers, 2), command(folder, 2 if quick else times * STEPS), _free_port()
        work(
            [
                Job(f"student, rank {rank}", folder / f"rank-{rank}.log", partial(train_rank, arguments, rank, ranks, port))
                for rank in range(ranks)
            ],
            ranks,
        )
    shutil.rmtree(folder / "model.tmp", ignore_errors=True)
    export(folder / "run", folder / "model.tmp")
    (folder / "model.tmp").rename(folder / "model")


def make_data(folder: Path, corpus: Path, teacher: Path) -> None:
    """Make tokenizer and datasets. Runs in its own process."""
    texts = read_part(corpus, "software", "train")
    write_tokenizer(folder / "tokenizer", [text.text for text in texts])
    test = read_part(corpus, "software", "test")
    chosen = np.random.default_rng(0).permutation(len(test))[:TEST_DOCUMENTS].tolist()
    for name, documents in (("general", texts), ("test", [test[i] for i in chosen])):
        build(documents, folder / name, folder / "tokenizer", teacher)


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Train a byte-level BPE, which can encode every text. It cuts numbers into digits, as the teacher's does."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}), encoding="utf-8")


def build(documents: Sequence[Text], out: Path, student: Path, teacher: Path) -> None:
    corpus = out.with_suffix(".jsonl")
    corpus.write_bytes(b"".join(orjson.dumps({"text": one.text}, option=orjson.OPT_APPEND_NEWLINE) for one in documents))
    command = [str(corpus), "--out", str(out), "--student", str(student), "--teacher", str(teacher), "--workers", "1"]
    command += ["--teacher-eos", smollm2.END]
    if code := build_dataset.main(command):
        raise SystemExit(code)


def command(folder: Path, steps: int) -> list[str]:
    """The arguments of the training command. Writes its DeepSpeed configuration."""
    settings = json.loads(SETTINGS.read_text(encoding="utf-8")) | BF16
    settings |= {"train_batch_size": ROWS_A_STEP, "train_micro_batch_size_per_gpu": ROWS_OF_A_RANK}
    settings["optimizer"]["params"]["lr"] = LEARNING_RATE
    (folder / SETTINGS.name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    every = max(steps // LOOKS, 1)
    overrides = [
        f"output={folder / 'run'}",
        f"data.train={folder / 'general'}",
        f"data.valid={folder / 'test'}",
        f"data.row_length={ROW}",
        f"student.config={toml(MODEL)}",
        f"training.steps={steps}",
        f"training.schedule.warmup_steps={steps // 20}",
        "training.schedule.min_lr_ratio=0.0",
        f"eval.every={every}",
        f"eval.rows={TEST_ROWS}",
        f"checkpoint.every={every}",
    ]
    arguments = [str(ARMS / "clm.toml"), "--deepspeed_config", str(folder / SETTINGS.name)]
    return arguments + [part for override in overrides for part in ("--set", override)]


def toml(fields: dict[str, Any]) -> str:
    return f"{{{', '.join(f'{name} = {json.dumps(value)}' for name, value in fields.items())}}}"


def train_rank(arguments: Sequence[str], rank: int, ranks: int, port: int) -> None:
    """Run one rank, in its own process."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.update({name: str(value) for name, value in where.items()})
    if code := main(arguments):
        raise SystemExit(code)


def flatness(folder: Path) -> tuple[int, list[float]]:
    """The number of tokens read, and bits per byte of text of other files at each evaluation, including one before step 1."""
    lines = read_metrics(folder / "run")
    tokens = sum(line.get("throughput/student_tokens", 0) for line in lines)
    return int(tokens), [line["eval/bits_per_byte"] for line in lines if "eval/bits_per_byte" in line]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
