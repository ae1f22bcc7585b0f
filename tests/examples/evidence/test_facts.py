"""The lines of the first experiment are wrong exactly if their labels are, and every token has its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.evidence import facts as task
from examples.evidence.lessons import open_tokenizer
from examples.evidence.mechanism import kinds

FACTS = task.invent_facts(150, 3)
KEY = ["key", "sign", "key", "sign"]


def value_of(line: task.Line) -> str:
    key, value = line.text.removesuffix(".").split("=")
    assert key == FACTS[line.fact].key
    return value


@pytest.mark.parametrize("corruption", ["random", "systematic"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_a_line_is_wrong_exactly_if_its_label_is(corruption: task.Corruption, share: float) -> None:
    lines = task.write_lines(FACTS, 1000, corruption, share, np.random.default_rng(5))
    assert sum(line.wrong for line in lines) == round(1000 * share)
    for line in lines:
        value, right = value_of(line), FACTS[line.fact].value
        assert len(value) == 3 and value[0] != "0"
        if line.wrong:
            assert all(a != b for a, b in zip(value, right, strict=True)), "a digit of a wrong value is right"
        else:
            assert value == right


def test_every_token_of_a_line_has_its_kind(tmp_path: Path) -> None:
    task.write_tokenizer(tmp_path, 2)
    tokenizer = open_tokenizer(tmp_path)
    assert kinds(task.Line("17+4=385.", 0, True), tokenizer).tolist() == [*KEY, "wrong", "wrong", "sign", "end"]
    assert kinds(task.Line("7+40=985.", 0, False), tokenizer).tolist() == [*KEY, "clean", "clean", "sign", "end"]
