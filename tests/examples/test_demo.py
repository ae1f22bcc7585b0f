"""The demo's corpus is real, large enough, and fairly divided."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[2] / "examples" / "demo" / "corpus.py"


@pytest.mark.long
@pytest.mark.slow
def test_the_corpus_is_large_and_its_parts_share_neither_text_nor_source(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("demo_corpus", CORPUS)
    assert spec is not None and spec.loader is not None
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    counts = corpus.write_corpus(tmp_path)
    parts = {part: [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()] for part in counts}
    assert counts["train"][1] > 2_000_000 and counts["heldout"][1] > 100_000
    assert {part: len(lines) for part, lines in parts.items()} == {part: documents for part, (documents, _) in counts.items()}
    for key in ("source", "text"):
        train, held_out = ({line[key] for line in lines} for lines in parts.values())
        assert len(train) > 500 and len(held_out) > 20
        assert not train & held_out
    assert len({line["text"] for lines in parts.values() for line in lines}) == sum(map(len, parts.values()))
