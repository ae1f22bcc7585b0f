"""A document that is tokenized in parts is the same as one that is tokenized whole; and memory does not grow with it."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.manifest import PAIRS, Totals
from megatron_vocagno.corpus.spans import align, encode, intersection_over_student
from megatron_vocagno.corpus.tokens import Tokenizer, Tokens, open_tokenizer
from megatron_vocagno.preprocess import long_texts, shard_writer
from megatron_vocagno.preprocess.documents import InputRecord
from megatron_vocagno.preprocess.inputs import InputSplit
from megatron_vocagno.preprocess.long_texts import AROUND, parts
from megatron_vocagno.preprocess.shard_writer import ShardWriter
from tests import tokenizers_for_tests as real
from tests.corpus.test_encoders import deepseek

ROOT = Path(__file__).parents[2]
Pair: TypeAlias = tuple[Tokenizer, Tokenizer]  # student, teacher

PIECE = InputSplit("a.jsonl", "lines", "", 0, 0, 0, 0)
PROSE = "\n\n".join(real.texts()[:40])[:60_000]
CODE = Path(argparse.__file__).read_text(encoding="utf-8")[:25_000]
CHINESE, JAPANESE, THAI = (real.multilingual_texts()[i] for i in (16, 17, 15))


def shuffled(text: str, n: int) -> str:
    """So that it does not repeat itself."""
    return "".join(random.Random(5).choices(text, k=n))


TEXTS = {
    "prose": PROSE[:25_000],
    "code": CODE,
    "Chinese and Japanese": "".join(random.Random(1).choices([*CHINESE.split(","), *JAPANESE.split("、")], k=900)),
    "Thai": "".join(random.Random(1).choices(THAI.split("ม"), k=1200)),
    "characters of all scripts in any order": shuffled("".join(real.multilingual_texts()), 9_000),
    "decomposed": unicodedata.normalize("NFD", "".join(real.multilingual_texts() * 5)),
    "awkward": "".join(text for text in real.awkward_texts() * 25 if "▁" not in text and len(text) < 200),
}
ENDLESS = {
    "one letter": "a" * 9000,
    "digits": shuffled("0123456789", 9000),
    "spaces": " " * 9000,
    "one character": "天" * 9000,
}


@pytest.fixture(params=["mistral, smollm2", "deepseek, mistral", "smollm2, deepseek"])
def pair(request, mistral, smollm2) -> Pair:
    known = {"mistral": lambda: mistral, "smollm2": lambda: smollm2, "deepseek": deepseek}
    student, teacher = (known[name]() for name in request.param.split(", "))
    return student, teacher


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of 1,500 characters, so that there are many."""
    assert AROUND < 700
    for module in (long_texts, shard_writer):
        monkeypatch.setattr(module, "PART_CHARACTERS", 1500)
    monkeypatch.setattr(long_texts, "REACH", 700)
    monkeypatch.setattr(long_texts, "TRIES", 16)
    monkeypatch.setattr(shard_writer, "BATCH_BYTES", 1500)


def written(folder: Path, texts: Sequence[str], pair: Pair, nfc: bool = True) -> Totals:
    folder.mkdir()
    writer = ShardWriter(folder, *pair, nfc, with_ids=True, name_of=lambda piece: Path(piece.url).name)
    records = (InputRecord(PIECE, i, 0, b"", text, "", f"id {text[:9]}") for i, text in enumerate(texts))
    return writer.write(records, lambda _: None)


def pairs_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".idx")}


def stored(folder: Path) -> dict[str, list[list[int]]]:
    """Of each pair, each document."""
    readers = {name: PairReader(folder / name) for name in PAIRS}
    return {name: [reader.read(i).tolist() for i in range(len(reader))] for name, reader in readers.items()}


def by_definition(student: Tokens, teacher: Tokens, eos: tuple[int, int]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """One document as `spans` defines it, and what it adds to the totals."""
    spans = align(student, teacher)
    coded = encode(spans.with_eos())
    numbers = {
        "student": [*student.ids.tolist(), eos[0]],
        "teacher": [*teacher.ids.tolist(), eos[1]],
        "spans": coded.codes.tolist(),
        "anchors": [*coded.anchors.tolist(), *coded.escapes.ravel().tolist()],
    }
    counts = {
        "student_tokens": len(student.ids) + 1,
        "teacher_tokens": len(teacher.ids) + 1,
        "zero_width_tokens": int((~spans.mapped).sum()),
        "covered_tokens": int((intersection_over_student(student, teacher, spans) == 1).sum()),
        "span_widths": np.bincount(np.minimum(spans.last - spans.first, 8), minlength=9),
    }
    return numbers, counts


def compare(folder: Path, totals: Totals, texts: Sequence[str], tokens: Sequence[tuple[Tokens, Tokens]], pair: Pair) -> None:
    found, eos = stored(folder), (pair[0].eos_id, pair[1].eos_id)
    sums: dict[str, Any] = {}
    for i, sides in enumerate(tokens):
        numbers, counts = by_definition(*sides, eos)
        for name in PAIRS:
            assert found[name][i] == numbers[name], (i, name)
        sums = {name: sums.get(name, 0) + n for name, n in counts.items()}
    widths = sums.pop("span_widths")
    widths[0] += len(texts)  # EOS
    n_bytes = sum(len(text.encode()) for text in texts)
    expected = Totals(documents=len(texts), eos_tokens=len(texts), text_bytes=n_bytes, span_widths=tuple(widths.tolist()), **sums)
    assert totals == expected
    assert totals.covered_tokens == totals.mapped_tokens


# ---- parts and the whole


@pytest.mark.parametrize("kind", TEXTS)
def test_a_document_in_parts_is_the_document_whole(kind, pair, short_parts, tmp_path):
    long = unicodedata.normalize("NFC", TEXTS[kind])
    texts = ["before", long, "after it", long[1:], "last"]
    n_parts = [len(list(parts([text], pair))) for text in (long, long[1:])]
    totals = written(tmp_path / "out", texts, pair)
    tokens = [(pair[0].encode_batch([text])[0], pair[1].encode_batch([text])[0]) for text in texts]
    compare(tmp_path / "out", totals, texts, tokens, pair)
    assert min(n_parts) >= len(long) // 1500 >= 5


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_can_be_cut_nowhere_is_tiled_and_aligned_all_the_same(kind, pair, short_parts, tmp_path):
    """One token at a cut may differ from those of the whole."""
    texts = [PROSE[:1000], ENDLESS[kind] + PROSE[:2000], ENDLESS[kind]]
    totals = written(tmp_path / "out", texts, pair)
    found = stored(tmp_path / "out")
    tokens = []
    for i, text in enumerate(texts):
        sides = []
        for name, tokenizer in zip(("student", "teacher"), pair, strict=True):
            ids = np.array(found[name][i][:-1], np.int32)
            ends = np.cumsum(tokenizer.byte_lengths[ids], dtype=np.int64) - int(tokenizer.prefixes([text])[0])
            assert ends[-1] == len(text.encode())
            whole = tokenizer.encode_batch([text])[0].ids
            assert abs(len(ids) - len(whole)) <= 2 * len(text) / 1500
            sides.append(Tokens(ids, ends))
        tokens.append((sides[0], sides[1]))
    compare(tmp_path / "out", totals, texts, tokens, pair)


def test_a_cut_is_a_boundary_of_both_and_parts_are_the_text(pair, short_parts):
    cuts = 0
    for text in TEXTS.values():
        made = list(parts([text], pair))
        assert "".join(made) == text and all(800 <= len(part) <= 1500 for part in made[:-1]) and 0 < len(made[-1]) <= 1500
        ends = [set(tokenizer.encode_batch([text])[0].ends.tolist()) for tokenizer in pair]
        at = np.cumsum([len(part.encode()) for part in made])[:-1].tolist()
        assert all(ends[0] & ends[1] >= {cut} for cut in at)
        cuts += len(at)
    assert cuts > 60


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_anchors_stand_where_they_do_in_the_whole(n, more, mistral, smollm2, short_parts, tmp_path):
    """Around a multiple of 4,096 tokens, where EOS may have an anchor of its own."""
    wanted = 4096 * n + more
    text = PROSE[: len(PROSE.encode()[: int(mistral.encode_batch([PROSE])[0].ends[wanted - 1])].decode())]
    tokens = mistral.encode_batch([text])[0], smollm2.encode_batch([text])[0]
    assert len(tokens[0].ids) == wanted
    totals = written(tmp_path / "out", [text], (mistral, smollm2))
    compare(tmp_path / "out", totals, [text], [tokens], (mistral, smollm2))
    assert len(stored(tmp_path / "out")["anchors"][0]) == n + (more >= 0)


def test_wide_spans_keep_their_place(smollm2_folder, short_parts, tmp_path):
    """DeepSeek has tokens of 128 bytes; the teacher's are bytes."""
    raw = json.loads((smollm2_folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    pair = deepseek(), open_tokenizer(tmp_path, eos_token="<|im_end|>")
    text = (PROSE[:2500] + "\n" + "." * 128 + "\n" + PROSE[2500:4800] + " " * 300 + "\n") * 3
    totals = written(tmp_path / "out", ["x", text], pair)
    tokens = [(pair[0].encode_batch([t])[0], pair[1].encode_batch([t])[0]) for t in ("x", text)]
    compare(tmp_path / "out", totals, ["x", text], tokens, pair)
    found = stored(tmp_path / "out")
    n_anchors = -(-len(found["student"][1]) // 4096)
    assert len(found["anchors"][1]) - n_anchors >= 2 * 6 and len(text) > 10_000


def test_added_tokens_are_not_cut(mistral, smollm2_folder, short_parts, tmp_path, monkeypatch):
    """Runs of spaces and of line ends, and a tag as long as what is looked at elsewhere."""
    raw = json.loads((smollm2_folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    monkeypatch.setattr(long_texts, "REACH", 1000)  # shorter than a part, as it is
    tag = "<" + "=" * AROUND + ">"
    added = [" " * 8, "\n" * 4, "<b>", tag]
    raw["added_tokens"] += [{"id": 49_152 + i, "content": content, **flags} for i, content in enumerate(added)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    pair = mistral, open_tokenizer(tmp_path, eos_token="<|im_end|>")
    chosen = random.Random(7)
    words = [*added, "word", " another", "\n", "\n\n\n\n\n", "<b>bold</b>", "      x", "1.5"]
    text = "".join(chosen.choices(words, k=400))
    tokens = mistral.encode_batch([text])[0], pair[1].encode_batch([text])[0]
    totals = written(tmp_path / "out", [text], pair)
    compare(tmp_path / "out", totals, [text], [tokens], pair)
    assert len(text) > 4_500 and all(int((tokens[1].ids == 49_152 + i).sum()) > 20 for i in range(4))


def test_a_document_is_long_by_its_characters_alone(pair, short_parts, tmp_path):
    """Just below, at and above the limit, in bytes and in characters."""
    texts = [PROSE[:n] for n in (1499, 1500, 1501, 1502, 3000)] + ["é" * n + " x" for n in (700, 1498, 1500)]
    totals = written(tmp_path / "out", texts, pair)
    tokens = [(pair[0].encode_batch([text])[0], pair[1].encode_batch([text])[0]) for text in texts]
    compare(tmp_path / "out", totals, texts, tokens, pair)


def test_a_long_document_is_a_batch_by_itself(pair, short_parts, tmp_path, monkeypatch):
    """As in a batch of twice a part, in which a short document has left room."""
    monkeypatch.setattr(shard_writer, "BATCH_BYTES", 3000)
    texts = ["short", TEXTS["decomposed"][:1600], "last"]
    assert not unicodedata.is_normalized("NFC", texts[1])
    totals = written(tmp_path / "out", texts, pair)
    tokens = [(pair[0].encode_batch([text])[0], pair[1].encode_batch([text])[0]) for text in map(nfc, texts)]
    compare(tmp_path / "out", totals, [*map(nfc, texts)], tokens, pair)


# ---- a document that does not fit


def test_a_mismatch_in_the_middle_takes_all_of_it_back(mistral, smollm2_folder, short_parts, tmp_path):
    """A teacher that normalizes by itself reads other bytes where the text is decomposed."""
    raw = json.loads((smollm2_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": {"type": "NFC"}}))
    pair = mistral, open_tokenizer(tmp_path, eos_token="<|im_end|>")
    bad = PROSE[:20_000] + unicodedata.normalize("NFD", "각각 가각") + PROSE[20_000:30_000]
    good = ["first", PROSE[:9000], "second", CODE[:5000]]
    some_bad = [good[0], bad, good[1], good[2], bad[9000:], bad[::-1], good[3]]
    clean = written(tmp_path / "clean", good, pair, nfc=False)
    spoilt = written(tmp_path / "spoilt", some_bad, pair, nfc=False)
    assert spoilt == clean.model_copy(update={"mismatched_documents": 3})
    assert pairs_of(tmp_path / "spoilt") == pairs_of(tmp_path / "clean")
    rows = [json.loads(row) for row in (tmp_path / "spoilt/quarantine.jsonl").read_bytes().splitlines()]
    assert [row["line"] for row in rows] == [2, 5, 6] and all(row["id"].startswith("id ") for row in rows)


# ---- memory


TELL_PEAK = """
import resource, sys
from tools.preprocess.build_dataset import main
if __name__ == "__main__":
    code = main(sys.argv[1:])
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    sys.exit(code)
"""


@pytest.mark.slow
def test_a_document_of_20_megabytes_needs_no_more_memory_than_others(settings, tmp_path, capsys):
    """The command line, with small tokenizers and two workers; peak of the worker that met it."""
    texts = real.texts()
    long = "\n".join(texts[:76]).encode("ascii", "ignore").decode()
    long = "🙂" + long * (20_000_000 // len(long) + 1)  # one such character, and Python stores four bytes for each
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in [*texts[:20], long, *texts[20:40]])
    command = [str(tmp_path / "a.jsonl"), "--student", settings.student, "--teacher", settings.teacher]
    command += ["--out", str(tmp_path / "out"), "--workers", "2", "--shard-mb", "0.1"]
    (tmp_path / "script.py").write_text(TELL_PEAK)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, tmp_path / "script.py", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split()[-1]) / 1024
    with capsys.disabled():
        print(f"\nworker with a document of 20 MB: {peak:.0f} MiB at most")
    # 287 alone; a twentieth more where other tests take the cores
    assert 100 < peak < 315
    ds = AlignedDataset.open(tmp_path / "out")
    assert len(ds) == 41 and ds.totals.text_bytes == sum(len(t.encode()) for t in [*map(nfc, texts[:40]), long])
    n = int(ds.student_lengths[20])
    assert n == ds.student_lengths.max() > 4_000_000
    # somewhere in it: the bytes of both sides from one common boundary to another
    cuts = 3_500_000 + np.flatnonzero(ds.common_boundary(20, 3_500_000, 3_505_000))
    spans = ds.spans(20, int(cuts[0]), int(cuts[-1]))
    student = ds.student_byte_lengths[ds.student(20, int(cuts[0]), int(cuts[-1]))].sum()
    teacher_bytes = ds.teacher_byte_lengths[ds.teacher(20, int(spans.first[0]), int(spans.last[-1]))].sum()
    assert student == teacher_bytes > 5_000


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
