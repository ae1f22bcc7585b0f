"""Junk in real text is known byte by byte, parts share nothing, and what is told of tokens is what they are."""

from __future__ import annotations

import base64
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
import pytest
from tokenizers import Tokenizer

from examples.demo.corpus import Text, champ_problems, docstrings
from examples.evidence import corpus, noise
from examples.evidence.junk import JUNK, NOTICES, Kind, NoisyText, insert_junk, token_labels
from examples.evidence.noisy_text import LONGEST, TextSet, choose, write_texts, write_tokenizer
from examples.evidence.running import Options
from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.config import Guidance
from megatron_vocagno.training.sample_files import SampleRows, SampleStep


@pytest.fixture(scope="module")
def parts() -> dict[corpus.Part, list[Text]]:
    """Of some of the real sources: all would take ten seconds."""
    return corpus.split(chain(champ_problems(), docstrings("networkx")))


@pytest.fixture(scope="module")
def clean(parts: dict[corpus.Part, list[Text]]) -> list[str]:
    return [text.text for text in choose(parts["train"], 150_000, np.random.default_rng(3))]


@pytest.fixture(scope="module")
def noisy(clean: list[str]) -> list[NoisyText]:
    random = np.random.default_rng(4)
    return [insert_junk(text, clean, random) for text in clean]


@pytest.fixture(scope="module")
def tokenizers(clean: list[str], teacher_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """The student's and the teacher's."""
    own = tmp_path_factory.mktemp("noise") / "tokenizer"
    write_tokenizer(own, clean)
    return [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (own, teacher_tokenizer)]


# ---- corpus


def test_parts_share_no_file_no_text_and_no_long_line(parts: dict[corpus.Part, list[Text]]) -> None:
    assert all(len(texts) > 50 for texts in parts.values()), {part: len(texts) for part, texts in parts.items()}
    for key in (
        lambda text: {text.source},
        lambda text: {text.text},
        lambda text: {line.strip() for line in text.text.split("\n") if len(line.strip()) >= 60},
    ):
        found = [set().union(*map(key, texts)) for texts in parts.values()]
        assert all(len(values) > 10 for values in found)
        assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    everything = [text.text for texts in parts.values() for text in texts]
    assert len(set(everything)) == len(everything)


def test_what_two_parts_share_stays_in_the_held_out_one() -> None:
    line = "A sentence that is long enough to be nobody else's, which two files have."
    source = {part: next(f"file-{i}" for i in range(1000) if corpus.part_of(f"file-{i}") == part) for part in corpus.PARTS}
    said = {"own": "{part} alone", "line": f"{{part}}, and\n{line}", "all": "of three files"}
    texts = [Text(f"{part}-{name}", source[part], text.format(part=part)) for part in corpus.PARTS for name, text in said.items()]
    kept = {part: [text.id for text in found] for part, found in corpus.split(reversed(texts)).items()}
    assert kept == {"test": ["test-all", "test-line", "test-own"], "tune": ["tune-own"], "train": ["train-own"]}


# ---- junk


def test_removing_the_junk_by_its_labels_gives_the_clean_text_back(clean: list[str], noisy: list[NoisyText]) -> None:
    met = Counter[int]()
    for before, after in zip(clean, noisy, strict=True):
        labels = after.labels().tolist()
        data = after.text.encode()
        assert len(labels) == len(data)
        assert bytes(byte for byte, label in zip(data, labels, strict=True) if label == 0).decode() == before == after.clean()
        met.update(labels)
    assert all(met[kind] > 5_000 for kind in (Kind.CLEAN, *JUNK)) and met[Kind.MIXED] == 0


def test_every_run_of_junk_is_of_the_kind_that_it_is_said_to_be(clean: list[str], noisy: list[NoisyText]) -> None:
    words, met = {word for text in clean for word in text.split()}, Counter[Kind]()
    for text in noisy:
        data, done = text.text.encode(), 0
        for kind, length in text.runs:
            said, done = data[done : done + length].decode(), done + length
            met[kind] += 1
            if kind == Kind.SALAD:
                assert set(said.split()) <= words
            elif kind == Kind.ENCODED:
                assert (
                    bytes.fromhex(said)
                    if all(c in "0123456789abcdef" for c in said[1:])
                    else base64.b64decode(said[1:], validate=True)
                )
            elif kind == Kind.NOTICE:
                assert said[1:] in NOTICES
            assert kind == Kind.CLEAN or said[0] == " "
        assert done == len(data)
    assert all(met[kind] > 100 for kind in JUNK)


def test_a_token_has_the_label_that_all_its_bytes_have(noisy: list[NoisyText]) -> None:
    random, met = np.random.default_rng(5), Counter[int]()
    for text in noisy[:60]:
        labels = text.labels()
        ends = np.sort(random.integers(0, len(labels) + 1, len(labels) // 4))
        ends[-1] = len(labels)
        found = token_labels(labels, ends)
        for start, end, label in zip([0, *ends[:-1].tolist()], ends.tolist(), found.tolist(), strict=True):
            kinds = {int(labels[byte]) for byte in range(start, end)}
            assert label == (kinds.pop() if len(kinds) == 1 else Kind.MIXED)
            met[label] += 1
    assert all(met[kind] > 100 for kind in Kind)


def test_no_token_of_either_model_has_bytes_of_two_kinds(noisy: list[NoisyText], tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        met = Counter[int]()
        for text in noisy[:60]:
            if text.text.isascii():  # elsewhere a character may be cut over several tokens, and characters are no bytes
                encoded = tokenizer.encode(text.text, add_special_tokens=False)
                ends = np.array([stop for _, stop in encoded.offsets], np.int64)
                met.update(token_labels(text.labels(), ends).tolist())
        assert met[Kind.MIXED] == 0
        assert all(met[kind] > 1_000 for kind in (Kind.CLEAN, *JUNK)), met
        assert 0.4 < sum(met[kind] for kind in JUNK) / sum(met.values()) < 0.6, met


def test_a_seed_decides_documents_and_junk(parts: dict[corpus.Part, list[Text]], tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "mathematics"
    folder.mkdir(parents=True)
    for part, texts in parts.items():
        (folder / f"{part}.jsonl").write_bytes(b"".join(noise_line(text) for text in texts[:200]))
    written = {}
    for run in ("first", "again"):
        for name in ("train-1", "train-2", "noisy-test", "clean-test"):
            texts = TextSet.named(name, Options(tmp_path / run))
            write_texts(texts, name, tmp_path / "corpus", 20_000)
            written[run, name] = texts.read()
    assert all(written["first", name] == written["again", name] for _, name in written)
    first, second = ({text.clean() for text in written["first", f"train-{seed}"]} for seed in (1, 2))
    assert len(first & second) < len(first) / 2
    held_out = {text.clean() for name in ("noisy-test", "clean-test") for text in written["first", name]}
    assert held_out <= {text.text for text in parts["test"]} and first | second <= {text.text for text in parts["train"]}
    assert all(len(text.clean().encode()) <= LONGEST for texts in written.values() for text in texts)
    assert all(text.clean() == text.text for text in written["first", "clean-test"])


def noise_line(text: Text) -> bytes:
    return orjson.dumps(text._asdict(), option=orjson.OPT_APPEND_NEWLINE)


# ---- scores


def test_enrichment_of_a_case_by_hand() -> None:
    """Two rows of six: five clean tokens of which four are kept, four of salad of which one is; an end, a token of two kinds."""
    clean, salad, mixed = Kind.CLEAN, Kind.SALAD, Kind.MIXED
    label_RS = np.array([[clean, clean, clean, salad, salad, mixed], [clean, clean, salad, salad, mixed, mixed]], np.uint8)
    weight_RS = np.array([[1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 1, 0]], np.float32)
    loss_RS = np.array([[1, 2, 3, 4, 5, 90], [6, 7, 8, 9, 90, np.nan]], np.float32)
    mapping_RS = np.full((2, 6), MappingStatus.MAPPED, np.uint8)
    mapping_RS[1, 4] = MappingStatus.END_OF_DOCUMENT
    document_RS = np.zeros((2, 6), np.int32)
    document_RS[1, 5] = -1
    nothing = np.zeros((2, 6), np.int32)
    rows = SampleRows(nothing, document_RS, nothing, nothing, nothing, mapping_RS, nothing, "valid", "fingerprint")
    look = SampleStep(60, loss_RS, np.zeros_like(loss_RS), weight_RS, Guidance())
    assert noise.noise_scores(rows, look, label_RS) == pytest.approx(
        {
            "kept_clean": 4 / 5,
            "kept_salad": 1 / 4,
            "kept_junk": 1 / 4,
            "enrichment_salad": 3.2,
            "enrichment_junk": 3.2,
            "loss_clean": (1 + 2 + 3 + 6 + 7) / 5,
            "loss_salad": (4 + 5 + 8 + 9) / 4,
            "loss_junk": (4 + 5 + 8 + 9) / 4,
            "loss_kept": (1 + 2 + 3 + 4 + 6) / 5,
            "loss_dropped": (5 + 7 + 8 + 9) / 4,
        }
    )
