"""Texts without a student: ids, byte ends and losses in parquet files."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from megatron_vocagno.corpus.tokens import open_tokenizer
from tests import tokenizers_for_tests as real
from tests.runs import write_teacher
from tools.preprocess import score_teacher


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_row_has_the_tokens_of_a_text_and_where_they_end(
    kind: str, tmp_path: Path, teacher_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "byte-level":
        teacher = write_teacher(tmp_path / "teacher", teacher_tokenizer)
    else:
        folder = tmp_path / "tokenizer"
        open_tokenizer(real.mistral_tokenizer_path()).save(folder)
        teacher = write_teacher(tmp_path / "teacher", folder)
    plain = [text for text in real.texts() if "\u2581" not in text]  # see loss_table
    texts = [*sorted(plain, key=len)[5:20], " begins with a space", "naïve Ünicode 漢字"]
    lines = [orjson.dumps({"content": text, "key": f"k{i}"}) for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    command = [str(tmp_path / "texts.jsonl"), "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    command += ["--context", "128", "--text-key", "content", "--id-key", "key", "--workers", "1"]
    assert score_teacher.main(command) == 0, capsys.readouterr()
    assert "1 file with 17 documents" in capsys.readouterr().out
    [file] = (tmp_path / "out" / "losses").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [row["id"] for row in rows] == [f"k{i}" for i in range(len(texts))]
    tokenizer, texts = open_tokenizer(teacher), [unicodedata.normalize("NFC", text) for text in texts]
    for row, text, tokens in zip(rows, texts, tokenizer.encode_batch(texts), strict=True):
        assert row["ids"] == [*tokens.ids.tolist(), tokenizer.eos_id]
        assert row["ends"][:-1] == tokens.ends.tolist() and row["ends"][-1] == len(text.encode())
        assert len(row["losses"]) == len(row["ids"]) and np.isfinite(row["losses"]).all()


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["a", "--reuse", "b", "--out", "c"], "unrecognized arguments: --reuse|the following arguments are required: --teacher"),
        (["texts", "a", "--teacher", "t"], "the following arguments are required: --out"),
        (["a", "b", "--teacher", "t"], "unrecognized arguments: b"),
        (["a"], r"the following arguments are required: --teacher \(or --reuse\)"),
    ):
        with pytest.raises(SystemExit) as ended:
            score_teacher.main(words)
        assert ended.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(("world", "options"), [("2", []), ("1", ["--placement", "zero3"])])
def test_several_processes_are_refused(
    world: str,
    options: list[str],
    tmp_path: Path,
    teacher_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    words = ["texts", "a", "--teacher", str(teacher_tokenizer), "--out", str(tmp_path / "out"), *options]
    assert score_teacher.main(words) == 2
    assert "build the dataset with build_dataset and the teacher as the student" in " ".join(capsys.readouterr().err.split())
