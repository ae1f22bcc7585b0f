"""`verify` finds whatever is not as it was written, and names the file."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset, merge
from megatron_vocagno.corpus.indexed import PairReader, PairWriter
from megatron_vocagno.corpus.manifest import Manifest, hash_file, read_manifest
from megatron_vocagno.corpus.verify import shard_checks, verify, verify_shard
from megatron_vocagno.errors import CorpusError, DatasetError
from tests.datasets import invent_dataset


@pytest.fixture
def copy(built, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(built.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".build"))


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_one_flipped_bit_is_found_in_every_file(copy):
    """At 60 random places, in each file as often as in any other; opening raises nothing but what a user can read."""
    random = np.random.default_rng(0)
    files = files_of(copy)
    hit, found = set(), 0
    for n in range(60):
        file = files[n] if n < len(files) else files[random.integers(len(files))]
        data = bytearray(file.read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        before = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CorpusError) as error:
            verify(copy)
        assert str(file) in str(error.value)
        with suppress(CorpusError):
            AlignedDataset.open(copy)
        file.write_bytes(before)
        hit.add(file)
        found += 1
    assert found == 60 and hit == set(files) and len(files) > 40
    verify(copy)


def test_every_bit_of_the_manifest_counts(copy):
    """Whitespace and its own checksum too."""
    file = copy / "dataset.json"
    whole = file.read_bytes()
    sealed = whole.index(read_manifest(copy).sha256.encode())
    places = {*range(0, len(whole), 97), *range(sealed, sealed + 64), whole.index(b"\n"), len(whole) - 1}
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        file.write_bytes(data)
        with pytest.raises(DatasetError, match=r"dataset\.json"):
            read_manifest(copy)
    assert len(places) > 150


def test_swapped_files_and_shards_are_found(copy):
    one, two = (copy / "shards" / name for name in ("0000", "0001"))
    for name in ("student.bin", ""):
        swap(one / name, two / name)
        with pytest.raises(DatasetError) as error:
            verify(copy)
        assert str(one / name) in str(error.value) and str(two / name) in str(error.value)
        swap(one / name, two / name)
    verify(copy)
    sides = [copy / "tokenizers" / side for side in ("student", "teacher")]
    swap(*sides)
    with pytest.raises(DatasetError) as error:
        verify(copy)
    assert all(str(side / "tokenizer.json") in str(error.value) for side in sides)


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def test_everything_that_is_wrong_is_told_at_once(copy):
    (copy / "shards" / "0001" / "teacher.idx").write_bytes(b"cut")
    shutil.rmtree(copy / "shards" / "0002")
    (copy / "tokenizers" / "student" / "tokenizer.json").unlink()
    with pytest.raises(DatasetError) as error:
        verify(copy)
    assert "0001/teacher.idx: 3 bytes, dataset.json records" in str(error.value)
    assert "0002/spans.bin is missing" in str(error.value) and "student/tokenizer.json is missing" in str(error.value)
    assert "0000" not in str(error.value)


@pytest.mark.parametrize(
    "stranger",
    [
        "shards/.0001.4f2a/student.bin",
        "shards/0001/notes.txt",
        "shards/0007/student.bin",
        ".dataset.json.17",
        "tokenizers/student/x",
    ],
)
def test_what_does_not_belong_is_found(copy, stranger):
    (copy / stranger).parent.mkdir(exist_ok=True)
    (copy / stranger).write_bytes(b"")
    with pytest.raises(DatasetError, match="does not belong to the dataset") as error:
        verify(copy)
    assert str(copy / stranger) in str(error.value) and str(error.value).count("\n") == 0


def test_an_empty_folder_does_not_belong_but_a_builds_memory_and_other_datasets_may_stay(copy, built, tmp_path):
    (copy / ".build").mkdir()
    (copy / ".build" / "plan.json").write_text("{}")
    shutil.copytree(built.path, copy / "another")
    verify(copy)
    (copy / "shards" / ".0003.77").mkdir()
    with pytest.raises(DatasetError, match=r"\.0003\.77 does not belong"):
        verify(copy)
    # the folders of merged shards are looked at too, wherever they lie
    merge([copy], tmp_path / "merged")
    with pytest.raises(DatasetError, match=r"0000/stray does not belong"):
        (copy / "shards" / "0000" / "stray").touch()
        verify(tmp_path / "merged")


def rehash(copy: Path, **changes: object) -> None:
    """Makes dataset.json agree with the files that lie there, so that only their content is wrong."""
    shards = []
    manifest = read_manifest(copy)
    for shard in manifest.shards:
        files = {file.name: hash_file(file) for file in files_of(copy / shard.path)}
        shards.append(shard.model_copy(update={"files": files}))
    write(copy, manifest.model_copy(update={"shards": tuple(shards), **changes}))


def write(copy: Path, manifest: Manifest) -> None:
    (copy / "dataset.json").write_bytes(manifest.sealed())


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("student.bin", -2, b"\x05\x00", "student.bin: document .* does not end with the student's EOS"),
        ("student.bin", 0, b"\xff\xff", "has id 65535"),
        ("teacher.bin", -2, b"\x05\x00", "does not end with the teacher's EOS"),
        ("spans.bin", -1, b"\x02", "ends with a token that is mapped"),
        ("spans.bin", 0, b"\x03", "document 0 starts with a token that shares"),
        ("spans.bin", 3, b"\x01", "document 0 has a token without a span that shares it"),
        ("spans.bin", 3, b"\x06", "document 0 does not lead to the anchors"),
        ("spans.bin", 3, b"\xff", "the escapes of documents 0 to .* are not those"),
        ("anchors.bin", 0, b"\x01", "document 0 does not lead to the anchors"),
        ("anchors.bin", 0, b"\x02", "starts at neither teacher token 0 nor 1"),
        ("anchors.bin", "second", b"\x01", "does not lead to the anchors"),
        ("anchors.idx", -1, b"\x01", "a document of several sequences"),
        ("teacher.idx", "pointer", b"\x01", "its pointers do not follow from its lengths"),
    ],
)
def test_what_was_written_wrong_is_found(copy, name, at, value, message):
    file = copy / "shards" / "0000" / name
    data = bytearray(file.read_bytes())
    if at == "second":  # the second anchor of the first document that has one
        lengths = PairReader(file.with_suffix("")).lengths
        at = 4 * int(lengths[: np.argmax(lengths > 1)].sum() + 1)
    if at == "pointer":  # of the first document
        at = 34 + 4 * len(PairReader(file.with_suffix("")))
    at %= len(data)
    assert data[at : at + len(value)] != value
    data[at : at + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(DatasetError, match="changed since it was written") as error:
        verify(copy)
    assert str(file) in str(error.value)
    rehash(copy)
    with pytest.raises(DatasetError, match=message) as error:
        verify(copy)
    assert str(copy / "shards" / "0000") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 1}, "documents, recorded are"),
        ({"student_tokens": 1}, "student tokens, recorded are"),
        ({"teacher_tokens": 1}, "teacher tokens, recorded are"),
        ({"zero_width_tokens": 1}, "unmapped tokens, recorded are"),
    ],
)
def test_totals_that_are_not_those_of_the_shard_are_found(copy, change, message):
    manifest = read_manifest(copy)
    shard = manifest.shards[1]
    ((name, by),) = change.items()
    totals = shard.totals.model_copy(update={name: getattr(shard.totals, name) + by})
    shards = (manifest.shards[0], shard.model_copy(update={"totals": totals}), *manifest.shards[2:])
    write(copy, manifest.model_copy(update={"shards": shards}))
    with pytest.raises(DatasetError, match=message) as error:
        verify(copy)
    assert "its totals are not the sum of its shards'" in str(error.value) and "0001" in str(error.value)


def test_wide_spans_and_long_documents_are_led_through(mistral, smollm2, tmp_path):
    """Escapes, many anchors, documents of one token, and more tokens than are looked at together."""
    lengths = [[1, 4095, 4096, 4097, 3], [1_300_000, 20_000, 1, 8191, 8192]]
    ds = invent_dataset(tmp_path / "wide", mistral, smollm2, lengths, wide=0.001)
    assert ds.totals.span_widths[8] > 1000
    seen = []
    ds.verify(on_shard=seen.append)
    assert [shard.path for shard in seen] == ["shards/0000", "shards/0001"]
    # each wide span's code counts
    prefix = tmp_path / "wide" / "shards" / "0001" / "anchors"
    pair = PairReader(prefix)
    sides = [pair.read(i).copy() for i in range(len(pair))]
    random = np.random.default_rng(0)
    n_anchors = -(-(1_300_000 + 1) // 4096)
    for escape in random.integers(0, (len(sides[0]) - n_anchors) // 2, 20):
        sides[0][n_anchors + 2 * escape + 1] += 2
        rewrite(prefix, sides)
        rehash(ds.path)
        with pytest.raises(DatasetError, match="document 0 does not lead to the anchors"):
            verify(ds.path)
        sides[0][n_anchors + 2 * escape + 1] -= 2
    # and an escape that a byte could have held is none
    code = sides[0][n_anchors + 1]
    sides[0][n_anchors + 1] = 126 << 1
    rewrite(prefix, sides)
    rehash(ds.path)
    with pytest.raises(DatasetError, match="the escapes of documents 0 to 0 are not those"):
        verify(ds.path)
    sides[0][n_anchors + 1] = code
    rewrite(prefix, sides)
    rehash(ds.path)
    verify(ds.path)


def rewrite(prefix: Path, documents: list[np.ndarray]) -> None:
    with PairWriter(prefix, documents[0].dtype) as pair:
        for document in documents:
            pair.add(document)


def test_ids_must_be_text(copy):
    for shard in read_manifest(copy).shards:
        good = [np.frombuffer("é".encode(), np.uint8)] * shard.totals.documents
        rewrite(copy / shard.path / "ids", good)
    rehash(copy, id_key="name")
    verify(copy)
    last = copy / shard.path / "ids"
    rewrite(last, [*good[:3], good[3][:1], *good[4:]])
    rehash(copy)
    with pytest.raises(DatasetError, match="document 3: its id is not UTF-8") as error:
        verify(copy)
    assert str(error.value).startswith(f"{last}.bin: ")


@pytest.mark.slow
def test_workers_may_verify_shards(copy):
    (copy / "shards" / "0001" / "student.bin").write_bytes(b"")
    checks = shard_checks(copy, read_manifest(copy))
    assert max(len(pickle.dumps(check)) for check in checks) < 10_000, "small, whatever the number of shards"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        complaints = list(pool.map(verify_shard, checks))
    assert [len(c) for c in complaints] == [0, 1, *([0] * (len(checks) - 2))]
    assert complaints[1][0].startswith(f"{copy / 'shards' / '0001' / 'student.bin'}: 0 bytes")
