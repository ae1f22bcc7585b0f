"""The lines of the first experiment: what is said to be wrong is wrong, and nothing else is."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from examples.evidence import facts as task
from examples.evidence.lessons import open_tokenizer
from examples.evidence.mechanism import kinds
from megatron_vocagno.corpus.tokens import open_tokenizer as open_aligned

FACTS = task.invent_facts(150, 3)
KEY = ["key", "sign", "key", "sign"]


def value_of(line: task.Line) -> str:
    key, value = line.text.removesuffix(".").split("=")
    assert key == FACTS[line.fact].key
    return value


@pytest.mark.parametrize("corruption", ["random", "systematic"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_a_line_is_wrong_exactly_where_its_label_says_so(corruption: task.Corruption, share: float) -> None:
    lines = task.write_lines(FACTS, 1000, corruption, share, np.random.default_rng(5))
    assert sum(line.wrong for line in lines) == round(1000 * share)
    for line in lines:
        value, right = value_of(line), FACTS[line.fact].value
        assert len(value) == 3 and value[0] != "0"
        if line.wrong:
            assert all(a != b for a, b in zip(value, right, strict=True)), "a digit of a wrong value is right"
        else:
            assert value == right


def test_systematic_noise_repeats_itself_and_random_noise_does_not() -> None:
    said: dict[str, dict[int, set[str]]] = {"random": defaultdict(set), "systematic": defaultdict(set)}
    for corruption in ("random", "systematic"):
        for line in task.write_lines(FACTS, 3000, corruption, 0.8, np.random.default_rng(6)):
            if line.wrong:
                said[corruption][line.fact].add(value_of(line))
    assert len(said["systematic"]) > 140 and all(values == {FACTS[i].distractor} for i, values in said["systematic"].items())
    assert np.mean([len(values) for values in said["random"].values()]) > 10


def test_other_values_differ_in_every_digit_and_all_are_met() -> None:
    others = task.other_values(np.full(20_000, 305), np.random.default_rng(0))
    assert set(others.tolist()) == {v for v in range(100, 1000) if all(a != b for a, b in zip(str(v), "305", strict=True))}


def test_keys_are_different_and_the_seed_decides_all() -> None:
    assert len({fact.key for fact in FACTS}) == len(FACTS)
    assert task.invent_facts(150, 3) == FACTS != task.invent_facts(150, 4)


def test_a_corpus_comes_back_as_it_was_written(tmp_path: Path) -> None:
    lines = task.write_lines(FACTS, 50, "random", 0.5, np.random.default_rng(7))
    task.save_corpus(lines, tmp_path / "corpus.jsonl")
    assert task.load_corpus(tmp_path / "corpus.jsonl") == lines


@pytest.mark.parametrize(("digits", "cut"), [(1, "1 7 + 4 = 3 8 5 ."), (2, "17 + 4 = 38 5 .")])
def test_tokenizers_cut_numbers_as_they_say_and_the_corpus_can_use_them(tmp_path: Path, digits: int, cut: str) -> None:
    task.write_tokenizer(tmp_path, digits)
    assert open_tokenizer(tmp_path).encode("17+4=385.").tokens == cut.split()
    aligned = open_aligned(tmp_path)
    (tokens,) = aligned.encode_batch(["17+4=385."])
    assert tokens.ends.tolist() == np.cumsum([len(piece) for piece in cut.split()]).tolist()
    assert aligned.eos_token == task.EOS


def test_every_token_of_a_line_has_its_kind(tmp_path: Path) -> None:
    task.write_tokenizer(tmp_path, 2)
    tokenizer = open_tokenizer(tmp_path)
    assert kinds(task.Line("17+4=385.", 0, True), tokenizer).tolist() == [*KEY, "wrong", "wrong", "sign", "end"]
    assert kinds(task.Line("7+40=985.", 0, False), tokenizer).tolist() == [*KEY, "clean", "clean", "sign", "end"]
