"""What a dataset says when it is opened, read, merged and verified."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from megatron_vocagno.corpus import verify as verification
from megatron_vocagno.corpus.dataset import AlignedDataset, merge
from megatron_vocagno.corpus.indexed import HEADER, PairReader, PairWriter, check_pointers, write_index
from megatron_vocagno.corpus.losses import require_unchanged
from megatron_vocagno.corpus.manifest import UNSEALED, FileRecord, LossTotals, Scoring, TeacherLosses, read_manifest
from megatron_vocagno.corpus.spans import Spans, align, encode
from megatron_vocagno.corpus.tokens import Tokens, open_tokenizer
from megatron_vocagno.corpus.verify import verify
from megatron_vocagno.errors import DatasetError
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.errors.telling import told
from tests.runs import Case
from tests.tokenizers_for_tests import mistral_tokenizer_path, smollm2_tokenizer_folder


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    """A dataset that may be damaged."""
    return shutil.copytree(case.valid, tmp_path / "data")


def seal(folder: Path, **changes: object) -> None:
    """Changes dataset.json and its checksum with it."""
    file = folder / "dataset.json"
    data = json.dumps(json.loads(file.read_text()) | changes | {"sha256": UNSEALED}).encode()
    file.write_bytes(data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1))


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with told(snapshot("DIR/nowhere is not a dataset: the path does not exist"), DIR=tmp_path):
        AlignedDataset.open(tmp_path / "nowhere")
    with told(snapshot("DIR is not a dataset: the folder has no dataset.json"), DIR=tmp_path):
        AlignedDataset.open(tmp_path)
    (tmp_path / "corpus.jsonl").touch()
    with told(
        snapshot(
            "DIR/corpus.jsonl is not a dataset: it is a file. python -m tools.preprocess.build_dataset makes a "
            "dataset of a corpus, and that is a folder"
        ),
        DIR=tmp_path,
    ):
        AlignedDataset.open(tmp_path / "corpus.jsonl")
    (tmp_path / "shards").mkdir()
    with told(
        snapshot("DIR/dataset.json is missing: the build of the dataset did not finish; run the same command again"), DIR=tmp_path
    ):
        AlignedDataset.open(tmp_path)
    with told(
        snapshot(
            "s3://bucket/data is not on this machine, and a dataset is read through memory maps: copy the folder "
            "first (`aws s3 sync URL DIR`, or fsspec.filesystem(PROTOCOL).get(URL, DIR, recursive=True)) and "
            "name the copy"
        )
    ):
        AlignedDataset.open("s3://bucket/data")


def test_a_dataset_that_has_changed(copy: Path) -> None:
    whole = (copy / "dataset.json").read_bytes()
    sha256 = json.loads(whole)["sha256"]
    (copy / "dataset.json").write_bytes(whole.replace(b'"nfc": true', b'"nfc": false'))
    altered = hashlib.sha256((copy / "dataset.json").read_bytes().replace(sha256.encode(), UNSEALED.encode(), 1)).hexdigest()
    with told(
        snapshot("DIR/dataset.json is damaged: its sha256 is ACTUAL, it records RECORDED: changed since it was written"),
        DIR=copy,
        ACTUAL=altered,
        RECORDED=sha256,
    ):
        AlignedDataset.open(copy)
    (copy / "dataset.json").write_bytes(b"{")
    with told(snapshot("DIR/dataset.json is damaged: unexpected end of data: line 1 column 2 (char 1)"), DIR=copy):
        AlignedDataset.open(copy)
    (copy / "dataset.json").write_bytes(whole)
    seal(copy, format=1)
    with told(snapshot("DIR/dataset.json: format 1, this reads format 2: made by another release? Build it again"), DIR=copy):
        AlignedDataset.open(copy)
    seal(copy, format=2, codec="other")
    with told(
        snapshot(
            "DIR/dataset.json: spans are coded as 'other', this reads 'width << 1 | shared, uint8, 255 escapes; anchors every 4096'"
        ),
        DIR=copy,
    ):
        AlignedDataset.open(copy)
    seal(copy, surprise=1)
    with told(
        snapshot(
            "DIR/dataset.json is not understood: surprise: Extra inputs are not permitted. Made by another release? Build it again"
        ),
        DIR=copy,
    ):
        AlignedDataset.open(copy)


def test_a_dataset_that_was_not_copied_whole(copy: Path) -> None:
    file = copy / "shards" / "0000" / "student.bin"
    whole, size = file.read_bytes(), f"{file.stat().st_size:,}"
    file.write_bytes(whole[:10])
    with told(
        snapshot("DIR/shards/0000/student.bin: 10 bytes, dataset.json records SIZE: cut off while copying, or disk full?"),
        DIR=copy,
        SIZE=size,
    ):
        AlignedDataset.open(copy)
    file.unlink()
    with told(
        snapshot(
            "DIR/shards/0000/student.bin is missing; dataset.json records it with SIZE bytes (No such file or "
            "directory): was the copy interrupted?"
        ),
        DIR=copy,
        SIZE=size,
    ):
        AlignedDataset.open(copy)
    file.write_bytes(whole)
    table = copy / "tokenizers" / "student" / "byte_lengths.npy"
    raw = table.read_bytes()
    table.write_bytes(raw.replace(b"'<i4'", b"'<u4'"))
    with told(
        snapshot("DIR/tokenizers/student/byte_lengths.npy is damaged: it contains uint32 (32000,), expected int32 (32000,)"),
        DIR=copy,
    ):
        AlignedDataset.open(copy)
    table.write_bytes(b"x" * len(raw))
    with told(
        snapshot("DIR/tokenizers/student/byte_lengths.npy is damaged: it is not a numpy array; copy the dataset again"), DIR=copy
    ):
        AlignedDataset.open(copy)


def test_a_dataset_of_another_tokenizer(case: Case, tmp_path: Path) -> None:
    data = AlignedDataset.open(case.valid)
    model = shutil.copytree(data.student_tokenizer.path, tmp_path / "model")
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with told(
        snapshot(
            "DATA: its student ids were made with another tokenizer than that of the student model, MODEL. They differ in: merges (DATA/tokenizers/student and MODEL); build the dataset again with that model's tokenizer, or use the model that it was built for"
        ),
        DATA=data.path,
        MODEL=model,
    ):
        data.require_tokenizer("student", model)
    other = AlignedDataset.open(shutil.copytree(case.valid, tmp_path / "other"))
    shutil.rmtree(other.path / "tokenizers" / "student")
    shutil.copytree(other.path / "tokenizers" / "teacher", other.path / "tokenizers" / "student")
    other.manifest = other.manifest.model_copy(update={"student": data.manifest.teacher})
    with told(
        snapshot(
            "TMP/other: its student ids were made with another tokenizer than those of DATA. They differ in: "
            "end-of-text token (0 and 2), number of tokens (49,152 and 32,000), vocabulary, merges, settings of its BPE, normalizer, "
            "pre-tokenizer; build one of them again with the other's tokenizer"
        ),
        TMP=tmp_path,
        DATA=data.path,
    ):
        other.require_tokenizers_of(data)


def test_a_dataset_that_was_made_without_its_added_tokens(tmp_path: Path) -> None:
    """As it was made before they were read: its record has the fingerprint of the tokenizer without them."""
    model = smollm2_tokenizer_folder(tmp_path / "model")
    bare = open_tokenizer(model, "huggingface").fingerprint
    raw = json.loads((model / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"].append({"id": len(raw["model"]["vocab"]), "content": "<br>", **flags})
    raw["model"]["vocab"]["<br>"] = len(raw["model"]["vocab"])
    (model / "tokenizer.json").write_text(json.dumps(raw))
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "one<br>two"}\n')
    settings = BuildConfig(student=str(mistral_tokenizer_path()), teacher=str(model), backend="huggingface")
    build([corpus], tmp_path / "data", settings)
    data = AlignedDataset.open(tmp_path / "data")
    assert data.require_tokenizer("teacher", model) is None and 49_152 in data.teacher(0)
    record = data.manifest.teacher.model_copy(update={"fingerprint": bare})
    data.manifest = data.manifest.model_copy(update={"teacher": record})
    with told(
        snapshot(
            "DATA: it was made without the 1 added tokens of its teacher tokenizer that texts may give ('<br>', …): its teacher ids "
            "are not those of MODEL. Build the dataset again"
        ),
        DATA=data.path,
        MODEL=model,
    ):
        data.require_tokenizer("teacher", model)


def test_a_model_without_a_tokenizer_is_said_not_to_be_compared(case: Case, tmp_path: Path) -> None:
    data = AlignedDataset.open(case.valid)
    assert data.require_tokenizer("student", tmp_path) == (
        f"the student model {tmp_path} has no tokenizer.json or tokenizer.model: it is not known whether {data.path} was made "
        "with its tokenizer"
    )


def test_a_model_with_tokenizer_model_alone_is_compared(case: Case, tmp_path: Path) -> None:
    data = AlignedDataset.open(case.valid)
    shutil.copy(mistral_tokenizer_path(), tmp_path / "tokenizer.model")
    assert data.require_tokenizer("student", tmp_path) is None
    shutil.copy(mistral_tokenizer_path().with_name("mistral_instruct_tokenizer_240323.model.v3"), tmp_path / "tokenizer.model")
    with pytest.raises(DatasetError, match=r"They differ in: number of tokens \(32,000 and 32,768\), .*vocabulary"):
        data.require_tokenizer("student", tmp_path)


def test_datasets_that_cannot_be_merged(case: Case, copy: Path, tmp_path: Path) -> None:
    with told(snapshot("DATA already contains a dataset; merge into a new folder"), DATA=case.valid):
        merge([copy], case.valid)
    with told(snapshot("nothing to merge: no dataset was named")):
        merge([], tmp_path / "out")
    with told(
        snapshot(
            "one dataset is named twice: its documents would count twice. To read it more often, give it a "
            "weight in the run's data.train instead"
        )
    ):
        merge([copy, copy], tmp_path / "out")
    seal(copy, nfc=False)
    with told(snapshot("TMP/data: nfc is False, in DATA it is True: build one of them again"), DATA=case.valid, TMP=tmp_path):
        merge([case.valid, copy], tmp_path / "out")


def test_losses_that_are_not_those_of_the_dataset(copy: Path) -> None:
    (copy / "shards" / "0000" / "teacher_loss.json").write_text("{}")
    scoring = Scoring(teacher="t", name="n", dtype="float32", weights="as-is", context=8, stride=4, before=0)
    files = ({"teacher_loss.json": FileRecord(size=3, sha256="x")},)
    losses = TeacherLosses(scoring=scoring, totals=LossTotals(), shards=files)
    with told(
        snapshot(
            "DIR/shards/0000/teacher_loss.json is not what DIR/dataset.json records: was the shard scored again, as part of another dataset?"
        ),
        DIR=copy,
    ):
        require_unchanged(copy, read_manifest(copy).model_copy(update={"teacher_losses": losses}))


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (
        lambda b: b"MMIDIDY" + b[7:],
        snapshot(
            "DIR/x.idx: starts with b'MMIDIDY\\x00\\x00' (142 bytes), an index with b'MMIDIDX\\x00\\x00' and 34 bytes or more"
        ),
    ),
    (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], snapshot("DIR/x.idx: version 2, this reads version 1")),
    (lambda b: b[:17] + b"\x09" + b[18:], snapshot("DIR/x.idx: dtype code 9, known are [1, 2, 3, 4, 5, 6, 7, 8]")),
    (lambda b: b[:-1], snapshot("DIR/x.idx: 141 bytes, 5 documents need 142: cut off while copying or writing?")),
    (
        lambda b: b[:26] + struct.pack("<Q", 5) + b[34:-8],
        snapshot("DIR/x.idx: 5 sequences in 4 documents; here each document is one sequence"),
    ),
    (
        lambda b: b[:HEADER] + struct.pack("<i", -6) + b[HEADER + 4 :],
        snapshot("DIR/x.idx: a document of -6 numbers: the file is damaged"),
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_an_index_that_is_damaged(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    idx = pair(tmp_path / "x", np.int32)
    idx.write_bytes(damage(idx.read_bytes()))
    with told(message, DIR=tmp_path):
        PairReader(tmp_path / "x")


def pair(prefix: Path, dtype: Any) -> Path:
    with PairWriter(prefix, dtype) as writer:
        for length in (5, 1, 0, 7, 3):
            writer.add(np.arange(length, dtype=dtype))
    return prefix.with_suffix(".idx")


def test_pairs_that_do_not_fit(tmp_path: Path) -> None:
    idx = pair(tmp_path / "x", np.int32)
    whole = idx.read_bytes()
    with told(snapshot("DIR/y: uint16, DIR/x: int32: pairs of one name have one dtype"), DIR=tmp_path):
        PairReader(tmp_path / "x", pair(tmp_path / "y", np.uint16).with_suffix(""))
    with told(snapshot("DIR/z: 65536 or 0 does not fit uint16"), DIR=tmp_path):
        PairWriter(tmp_path / "z", np.uint16).add(np.array([0, 65_536]))
    with told(snapshot("DIR/z: a document of 2,147,483,648 numbers; an index holds 2,147,483,647 at most"), DIR=tmp_path):
        write_index(tmp_path / "z", np.dtype(np.uint16), np.array([5, 2**31]))
    pointers = snapshot("DIR/x.idx: its pointers do not follow from its lengths: the file is damaged")
    sequences = snapshot("DIR/x.idx: a document of several sequences; here each document is one")
    for at in (HEADER + 20, HEADER + 60):
        idx.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with told(pointers if at < HEADER + 60 else sequences, DIR=tmp_path):
            check_pointers(tmp_path / "x")
    idx.write_bytes(whole)
    (tmp_path / "x.bin").write_bytes(b"short")
    with told(snapshot("DIR/x.bin: 5 bytes, its index describes 64: cut off while copying or writing?"), DIR=tmp_path):
        PairReader(tmp_path / "x").read(0)
    (tmp_path / "x.bin").unlink()
    with told(snapshot("DIR/x.bin cannot be read (No such file or directory): a pair is a .bin and a .idx"), DIR=tmp_path):
        PairReader(tmp_path / "x").read(0)
    idx.unlink()
    with told(snapshot("DIR/x.idx cannot be read (No such file or directory): a pair is a .bin and a .idx"), DIR=tmp_path):
        PairReader(tmp_path / "x")


def test_tokens_that_cannot_be_aligned() -> None:
    def tokens(*ends: int, ends_from: Any = "table") -> Tokens:
        return Tokens(np.arange(len(ends), dtype=np.int32), np.array(ends, np.int64), ends_from)

    with told(snapshot("the byte ends of the teacher's tokens are unknown: does its tokenizer change the text?")):
        align(tokens(1, 2), tokens(3, ends_from="unknown"))
    with told(
        snapshot(
            "student reads 2 bytes, teacher 3: both must read the same text; is one of the tokenizers "
            "normalizing (NFKC, lower-casing)?"
        )
    ):
        align(tokens(1, 2), tokens(3))
    with told(snapshot("student token 1 has no text and is not at the document's start: ends must rise")):
        align(tokens(1, 1, 3), tokens(3))
    with told(
        snapshot(
            "token 1 starts at teacher token 3, the one before it ends at 1: neighbors must touch or share one teacher token"
        )
    ):
        encode(Spans(np.array([0, 3], np.int32), np.array([1, 4], np.int32), 0))


def test_what_verify_finds(copy: Path) -> None:
    totals = json.loads((copy / "dataset.json").read_text())["totals"]
    (copy / "notes.txt").touch()
    seal(copy, totals=totals | {"documents": 11})
    with told(
        snapshot(
            "DIR/notes.txt does not belong to the dataset: left by a killed worker, or put there since?\n"
            "DIR/dataset.json: its totals are not the sum of its shards'"
        ),
        DIR=copy,
    ):
        verify(copy)


def test_ids_and_losses_that_were_written_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    student: Any = SimpleNamespace(
        prefix="DIR/student", lengths=np.array([2]), starts=np.array([0, 2]), flat=np.array([70, 2]), refuse=lambda *_: None
    )
    with told(snapshot("DIR/student.bin has id 70 or 2, the student's vocabulary has 50")):
        verification._check_ids(student, SimpleNamespace(eos_id=2, vocab_size=50), "student")  # type: ignore[arg-type]
    losses = SimpleNamespace(prefix="DIR/teacher_loss", lengths=np.array([1]), flat=np.zeros(1, np.uint16))
    monkeypatch.setattr(verification, "_Pair", lambda _: losses)
    monkeypatch.setattr(verification, "read_losses", lambda *_: None)
    check: Any = SimpleNamespace(folder=Path("DIR"), record=None)
    with told(snapshot("DIR/teacher_loss.idx: the lengths are not those of the teacher tokens")):
        verification._check_losses(check, student)
    student.lengths = losses.lengths
    with told(snapshot("DIR/teacher_loss.bin: 0 NaN and 0 infinite losses of 1, recorded are None")):
        verification._check_losses(check, student)
