"""The texts of the third experiment: mathematics, word problems and code with junk, with the kind of every byte known.

    ROOT/data/continued/NAME/texts.jsonl   {"id", "text", "runs"}: runs of [kind, bytes]
    ROOT/data/continued/NAME/dataset       aligned and scored
    ROOT/data/continued/NAME/oracle        with the losses of the oracle
    ROOT/data/continued/NAME/constant      with the same loss for every teacher token
    ROOT/data/continued-other/NAME/        the same of other texts

NAME            from the files of part      content
train-SOURCE    train                       a source of the mixture
mixed-PART      test, tune                  a sample of all sources, for measuring kept shares
DOMAIN-PART     test, tune                  clean text of one domain
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from examples.demo.corpus import Text
from examples.evidence.corpus import Domain, Part, long_lines, read_part
from examples.evidence.junk import Kind, insert_junk
from examples.evidence.oracle import write_constant, write_oracle
from examples.evidence.problems import Problem, invent_problems
from megatron_vocagno.corpus.dataset import AlignedDataset
from tools.preprocess import build_dataset, score_teacher

SHARES = {"mathematics": 0.4, "problems": 0.4, "code": 0.2}
"""Share of the rows of the mixture, by source."""
DOMAINS: tuple[Domain, ...] = ("mathematics", "software", "code")
"""The initial student was trained on `software` only."""
WRONG = 0.3
"""Share of the problems in the mixture that have a wrong result."""
LONGEST = 1_500
"""Bytes. Longer documents are cut between lines."""
TRAIN = {"mathematics": 205_000, "problems": 1_850, "code": 62_000}
MIXED = {"mathematics": 9_000, "problems": 50, "code": 4_000}
HELD_OUT = {"mathematics": 30_000, "software": 12_000, "code": 12_000}
"""Bytes of text before junk is added, and numbers of problems."""
NOISE = ("junk", "wrong")
END = "end"


class Labelled(NamedTuple):
    """A text, and the kinds of its bytes.

    Kinds are `mathematics`, `software`, `code` and `junk`. A problem has `question`, `work`, `result` or `wrong`
    (a wrong result), and `point`.
    """

    text: str
    runs: list[tuple[str, int]]


@dataclass(frozen=True)
class Texts:
    """A set of texts, and the paths of its files."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def oracle(self) -> Path:
        return self.folder / "oracle"

    @property
    def constant(self) -> Path:
        return self.folder / "constant"

    @property
    def whole(self) -> Path:
        """Exists when all other files are complete."""
        return self.folder / "whole"

    def read(self) -> list[Labelled]:
        """The texts, in the order of the dataset's documents."""
        with self.corpus.open("rb") as file:
            lines = [orjson.loads(line) for line in file]
        return [Labelled(line["text"], [(kind, length) for kind, length in line["runs"]]) for line in lines]


def make(texts: Texts, corpus: Path, student: Path, teacher: Path, divisor: int = 1, number: int = 0) -> None:
    """Write texts, align them for both tokenizers and score them with the teacher. Runs in its own process.

    divisor: sizes are divided by it. number: sets of texts of different numbers have no piece of text in common
    """
    write(texts, compose(texts.folder.name, corpus, divisor, number))
    places = [str(texts.corpus), "--out", str(texts.dataset), "--student", str(student), "--teacher", str(teacher)]
    _succeed(build_dataset.main([*places, "--workers", "1", "--max-bad-fraction", "0"]))
    _succeed(score_teacher.main([str(texts.dataset), "--teacher", str(teacher), "--tokens-per-batch", "2048"]))
    data, read = AlignedDataset.open(texts.dataset), texts.read()
    write_oracle(
        texts.dataset, texts.oracle, lambda i: np.isin(kinds_of(read[i], data.teacher(i), data.teacher_byte_lengths), NOISE)
    )
    write_constant(texts.dataset, texts.constant)
    texts.whole.touch()


def write(texts: Texts, documents: Sequence[Labelled]) -> None:
    texts.folder.mkdir(parents=True, exist_ok=True)
    with texts.corpus.open("wb") as file:
        for number, (text, runs) in enumerate(documents):
            file.write(orjson.dumps({"id": str(number), "text": text, "runs": runs}, option=orjson.OPT_APPEND_NEWLINE))


def compose(name: str, corpus: Path, divisor: int = 1, number: int = 0) -> list[Labelled]:
    """The documents of a set, by its name. They are always the same."""
    first, _, second = name.partition("-")
    if first == "train":
        return of_source(second, corpus, "train", TRAIN[second] // divisor, number)
    part: Part = "tune" if second == "tune" else "test"
    if first == "mixed":
        documents = [one for source in SHARES for one in of_source(source, corpus, part, MIXED[source] // divisor, number)]
        order = np.random.default_rng(0).permutation(len(documents)).tolist()
        return [documents[i] for i in order]
    domain = next(domain for domain in DOMAINS if domain == first)
    # the parts of a domain share no long line, but one domain may quote another
    learned = {line for other in DOMAINS for text in read_part(corpus, other, "train") for line in long_lines(text.text)}
    texts = some_of(domain, corpus, part, HELD_OUT[domain] // divisor, number)
    return [plain(text, domain) for text in texts if not long_lines(text) & learned]


def of_source(source: str, corpus: Path, part: Part, size: int, number: int = 0) -> list[Labelled]:
    """Problems, or texts with this many bytes, of one source of the mixture. Other numbers give other problems and texts."""
    if source == "problems":
        return [of_problem(problem) for problem in invent_problems(max(size, 1), part, seed=2 * number, wrong=WRONG)]
    if source == "mathematics":
        return [plain(text, source) for text in some_of("mathematics", corpus, part, size, number)]
    texts, random = some_of("code", corpus, part, size, number), np.random.default_rng(1 + number)
    return [spoiled(text, texts, random) for text in texts]


def some_of(domain: Domain, corpus: Path, part: Part, size: int, number: int = 0) -> list[str]:
    """A random choice of texts of a domain with this many bytes, none longer than LONGEST. It follows those of lower numbers."""
    pieces = [piece for text in read_part(corpus, domain, part) for piece in cut(text)]
    order = iter(np.random.default_rng(0).permutation(len(pieces)).tolist())
    for _ in range(number + 1):
        chosen, total = [], 0
        while total < size and (i := next(order, None)) is not None:
            chosen.append(pieces[i])
            total += len(pieces[i].encode())
    return chosen


def cut(text: Text) -> list[str]:
    """Pieces of complete lines, of at most LONGEST bytes. A longer line is left out."""
    pieces = [""]
    for line in text.text.splitlines(keepends=True):
        length = len(line.encode())
        if len(pieces[-1].encode()) + length > LONGEST:
            pieces.append("")
        if length <= LONGEST:
            pieces[-1] += line
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def plain(text: str, kind: str) -> Labelled:
    return Labelled(text, [(kind, len(text.encode()))])


def of_problem(problem: Problem) -> Labelled:
    result = str(problem.result)
    kind = "wrong" if problem.wrong else "result"
    parts = [("question", problem.question), ("work", problem.work), (kind, result), ("point", ".")]
    return Labelled(problem.text, [(kind, len(part)) for kind, part in parts])


def spoiled(text: str, others: Sequence[str], random: np.random.Generator) -> Labelled:
    noisy = insert_junk(text, others, random)
    return Labelled(noisy.text, [("code" if run.kind == Kind.CLEAN else "junk", run.length) for run in noisy.runs])


def kinds_of(text: Labelled, ids: NDArray[np.int32], byte_lengths: NDArray[np.int32]) -> NDArray[np.str_]:
    """[N] the kind of each token of a document, which is that of its last byte, or END for the token that ends the document.

    ids           [N] the ids of the whole document
    byte_lengths  [V] the byte lengths of the tokenizer's tokens
    """
    ends = np.cumsum(byte_lengths[ids[:-1]], dtype=np.int64)
    borders = np.cumsum([length for _, length in text.runs])
    assert ends[-1] == borders[-1], f"{ends[-1]} bytes in its tokens, {borders[-1]} in its text: {text.text[:60]!r}"
    names = np.array([kind for kind, _ in text.runs])
    return np.append(names[np.searchsorted(borders, ends)], END)


def kinds_in(texts: Texts) -> Callable[[int], NDArray[np.str_]]:
    """A function from the number of a document of the dataset to the [N] kinds of its student tokens."""
    data, read = AlignedDataset.open(texts.dataset), texts.read()
    return lambda document: kinds_of(read[document], data.student(document), data.student_byte_lengths)


def _succeed(code: int) -> None:
    if code:
        raise SystemExit(code)
