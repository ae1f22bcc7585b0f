"""The second experiment: its parts share no text, its junk is known byte by byte, and its scores are exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from examples.demo.corpus import Text, champ_problems
from examples.evidence import corpus, noise
from examples.evidence.junk import JUNK, Kind, NoisyText, insert_junk, token_labels
from examples.evidence.noisy_text import choose
from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.config import Guidance
from megatron_vocagno.training.sample_files import SampleRows, SampleStep


@pytest.fixture(scope="module")
def parts() -> dict[corpus.Part, list[Text]]:
    """Texts of one of the real sources."""
    return corpus.split(champ_problems())


@pytest.fixture(scope="module")
def clean(parts: dict[corpus.Part, list[Text]]) -> list[str]:
    return [text.text for text in choose(parts["train"], 150_000, np.random.default_rng(3))]


@pytest.fixture(scope="module")
def noisy(clean: list[str]) -> list[NoisyText]:
    random = np.random.default_rng(4)
    return [insert_junk(text, clean, random) for text in clean]


# ---- corpus


def test_what_two_parts_share_stays_in_the_held_out_one() -> None:
    line = "A sentence that is longer than sixty characters, and that two files have."
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
