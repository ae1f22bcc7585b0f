"""The texts of the second experiment: mathematical text with junk.

    ROOT/data/noise/tokenizer/            the student's: 2,048 byte-level tokens, trained on all training text
    ROOT/data/noise/NAME/texts.jsonl      {"id", "text", "runs"}: runs of [kind, bytes]
    ROOT/data/noise/NAME/dataset, oracle  aligned, with the losses of the teacher and of the oracle

NAME is train-SEED for documents of training files, which the seed chooses and adds junk to. noisy-PART and clean-PART are
documents of held-out files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo.corpus import Text
from examples.evidence import smollm2
from examples.evidence.corpus import Part, read_part, write_corpus
from examples.evidence.jobs import Job, work
from examples.evidence.junk import Kind, Labels, NoisyText, Run, insert_junk, token_labels
from examples.evidence.oracle import write_oracle
from examples.evidence.running import Options
from megatron_vocagno.corpus.dataset import AlignedDataset
from tools.preprocess import build_dataset, score_teacher

BYTES = {"train": 75_000, "clean": 40_000, "noisy": 14_000}
"""Bytes of clean text per set."""
LONGEST = 3_000
"""Bytes per document. Many short documents are more diverse than a few long ones."""
VOCABULARY = 2_048
END = "<|end|>"


@dataclass(frozen=True)
class TextSet:
    """A set of texts, and the paths of its files."""

    folder: Path

    @classmethod
    def named(cls, name: str, options: Options) -> TextSet:
        return cls(options.root / "data" / ("noise-quick" if options.quick else "noise") / name)

    @property
    def texts(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def oracle(self) -> Path:
        return self.folder / "oracle"

    @property
    def whole(self) -> Path:
        """Exists when all other files are complete."""
        return self.folder / "whole"

    @property
    def tokenizer(self) -> Path:
        return self.folder.parent / "tokenizer"

    def read(self) -> list[NoisyText]:
        """The texts, in the order of the dataset's documents."""
        with self.texts.open("rb") as file:
            lines = [orjson.loads(line) for line in file]
        return [NoisyText(line["text"], [Run(Kind(kind), length) for kind, length in line["runs"]]) for line in lines]


def prepare_sets(names: Sequence[str], options: Options) -> None:
    """Make the missing sets, with corpus, teacher and tokenizer."""
    sets = {name: TextSet.named(name, options) for name in names}
    missing = {name: texts for name, texts in sets.items() if not texts.whole.exists()}
    if not missing:
        return
    corpus, logs = options.root / "corpus", options.root / "data"
    making_corpus = Job("corpus", logs / "corpus.log", partial(write_corpus, corpus, ["mathematics"]))
    work([making_corpus, Job("teacher", logs / "teacher.log", partial(smollm2.write_teacher, options.root))], options.workers)
    for name, texts in missing.items():
        write_texts(texts, name, corpus, BYTES[name.partition("-")[0]] // (20 if options.quick else 1))
    scoring = [
        Job(name, texts.folder.parent / f"{name}.log", partial(score_texts, texts, smollm2.teacher(options.root)))
        for name, texts in missing.items()
    ]
    work(scoring, options.workers)


def write_texts(texts: TextSet, name: str, corpus: Path, size: int) -> None:
    """Write the texts of one set, of this many bytes before junk, and the student's tokenizer if it is missing."""
    if not texts.tokenizer.exists():
        write_tokenizer(texts.tokenizer, [text.text for text in read_part(corpus, "mathematics", "train")])
    kind, _, which = name.partition("-")
    part: Part = "train" if kind == "train" else "tune" if which == "tune" else "test"
    random = np.random.default_rng([int(which) if kind == "train" else 0, len(kind)])
    documents = choose(read_part(corpus, "mathematics", part), size, random)
    others = [document.text for document in documents]
    texts.folder.mkdir(parents=True, exist_ok=True)
    with texts.texts.open("wb") as file:
        for document in documents:
            noisy = unspoiled(document.text) if kind == "clean" else insert_junk(document.text, others, random)
            line = {"id": document.id, "text": noisy.text, "runs": [list(run) for run in noisy.runs]}
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def unspoiled(text: str) -> NoisyText:
    return NoisyText(text, [Run(Kind.CLEAN, len(text.encode()))])


def choose(documents: Sequence[Text], size: int, random: np.random.Generator) -> list[Text]:
    """Random texts, until they have this many bytes."""
    chosen, total = [], 0
    for i in random.permutation(len(documents)).tolist():
        length = len(documents[i].text.encode())
        if total < size and length <= LONGEST:
            chosen.append(documents[i])
            total += length
    return chosen


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Train a byte-level BPE, which can encode every text and keeps every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    made = folder.with_suffix(".tmp")
    made.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}), encoding="utf-8")
    made.rename(folder)


def score_texts(texts: TextSet, teacher: Path) -> None:
    """Make the aligned dataset with the losses of the teacher and those of the oracle. Runs in its own process."""
    places = [str(texts.texts), "--out", str(texts.dataset), "--student", str(texts.tokenizer), "--teacher", str(teacher)]
    places += ["--teacher-eos", smollm2.END]
    _succeed(build_dataset.main([*places, "--id-key", "id", "--workers", "1", "--max-bad-fraction", "0"]))
    _succeed(score_teacher.main([str(texts.dataset), "--teacher", str(teacher), "--tokens-per-batch", "2048"]))
    data, noisy = AlignedDataset.open(texts.dataset), texts.read()
    write_oracle(texts.dataset, texts.oracle, lambda i: labels_of(noisy[i], i, data, "teacher") != Kind.CLEAN)
    texts.whole.touch()


def _succeed(code: int) -> None:
    if code:
        raise SystemExit(code)


def labels_of(text: NoisyText, document: int, data: AlignedDataset, side: str) -> Labels:
    """[N] the Kind of the tokens of one document, on the `student` or `teacher` side. The last token is MIXED."""
    ids = data.student(document) if side == "student" else data.teacher(document)
    lengths = data.student_byte_lengths if side == "student" else data.teacher_byte_lengths
    ends, labels = np.cumsum(lengths[ids[:-1]], dtype=np.int64), text.labels()
    assert ends[-1] == len(labels), f"{data.path}, document {document}: {ends[-1]} bytes in its tokens, {len(labels)} in its text"
    return np.append(token_labels(labels, ends), np.uint8(Kind.MIXED))
