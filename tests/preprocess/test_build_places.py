"""Builds from and into other places than this machine's disk: the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.places import place
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.preprocess import shards
from megatron_vocagno.preprocess.build import build, finish
from megatron_vocagno.preprocess.plan import Slice, plan
from tests.corpus import test_places
from tests.corpus.conftest import contents, make, write_jsonl
from tests.corpus.formats import write
from tests.preprocess.test_build import SHARD, tokens
from tests.preprocess.test_build_dataset import arguments, finished, start

bucket = test_places.bucket  # an S3 server of this module


@pytest.fixture(params=["memory", "file", "s3"])
def remote(request, tmp_path) -> Iterator[str]:
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    else:
        yield f"file://{tmp_path}/remote" if request.param == "file" else f"memory://{tmp_path.name}"


def download(url: str, folder: Path) -> Path:
    for file in place(url).rglob("*"):
        if file.is_file():
            write(folder / str(file).removeprefix(str(place(url))).lstrip("/"), file.read_bytes())
    return folder


def test_every_place_gives_the_bytes_of_a_local_build(remote, built, corpus, settings, tmp_path):
    source = place(f"{remote}/in/{corpus.name}")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(corpus.read_bytes())
    made: list[Any] = []
    run = partial(build, [source], f"{remote}/out", settings, shard_bytes=SHARD, on_shard=made.append)
    for i in (2, 1):
        run(part=Slice(i, 2))
    finish(f"{remote}/out", settings)
    assert contents(download(f"{remote}/out", tmp_path / "a")) == contents(built.path)
    AlignedDataset.open(tmp_path / "a").verify()
    assert [result.reused for result in made] == [False] * 5
    made.clear()
    (place(f"{remote}/out") / "shards/0002/spans.idx").unlink()
    run()
    assert [result.reused for result in made] == [True, True, False, True, True]
    assert contents(download(f"{remote}/out", tmp_path / "b")) == contents(built.path)
    source.write_bytes(corpus.read_bytes().replace(b" the ", b" THE "))
    with pytest.raises(ChangedError, match="other input"):
        run()
    run(shard_bytes=3 * SHARD, force=True)
    fresh = place(f"{remote}/fresh")
    build([source], fresh, settings, shard_bytes=3 * SHARD)
    both = [contents(download(f"{remote}/{name}", tmp_path / f"c/{name}")) for name in ("out", "fresh")]
    assert both[0] == both[1] and sum("shard.json" in name for name in both[0]) == 2


@pytest.mark.slow
def test_workers_build_from_and_into_an_object_store(bucket, built, corpus, settings, tmp_path):
    place(f"{bucket}/cli/in/{corpus.name}").write_bytes(corpus.read_bytes())
    build([place(f"{bucket}/cli/in/{corpus.name}")], f"{bucket}/cli/out", settings, shard_bytes=SHARD, part=Slice(1, 2))
    words = arguments(settings, f"{bucket}/cli/in/*.jsonl", out=f"{bucket}/cli/out", shard_mb=SHARD / 2**20, workers=2)
    code, out, err = finished(start(words))
    assert (code, err) == (0, "") and "(3 reused)" in out
    assert contents(download(f"{bucket}/cli/out", tmp_path / "a")) == contents(built.path)


@pytest.mark.parametrize("remote", ["memory", "s3"], indirect=True)
def test_an_upload_that_breaks_off_leaves_no_finished_shard(remote, settings, tmp_path, monkeypatch):
    """Neither a new one nor an old one with some new files, though these are of the same size: each text is a token."""
    old, new = ([write_jsonl(tmp_path / f"{ord(word)}.jsonl", [word] * 9)] for word in ("`", "~"))
    out = f"{remote}/out"
    build(old, out, settings)
    jobs = [replace(plan(inputs, settings).jobs(out, settings)[0], trusted=True) for inputs in (old, new)]
    sizes = {file.name: file.stat().st_size for file in (place(out) / "shards/0000").iterdir()}
    assert shards.finished(jobs[0]) and len(sizes) == 9
    original = shutil.copyfileobj
    for k in (1, 4, 8):
        copied: list[str] = []

        def copy(source, target, *rest, copied=copied, k=k):
            original(source, target, *rest)
            copied.append(Path(source.name).name)
            if len(copied) == k:  # nothing is there to go on with
                shutil.rmtree(Path(source.name).parent)

        monkeypatch.setattr(shutil, "copyfileobj", copy)
        with pytest.raises(FileNotFoundError):
            build(new, out, settings, force=True)
        monkeypatch.undo()
        there = {file.name: file.stat().st_size for file in (place(out) / "shards/0000").iterdir()}
        assert len(copied) == k and there.items() <= sizes.items() and not (place(out) / "dataset.json").exists()
        assert [shards.finished(job) for job in jobs] == [None, None]
        build(old, out, settings, force=True)
    build(new, out, settings, force=True)
    assert tokens(download(out, tmp_path / "out")) == tokens(make(new, tmp_path / "local", settings).path)


def test_an_object_store_that_does_not_answer_is_told(settings, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", ["x"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises((CorpusError, OSError), match=r"127\.0\.0\.1:1"):
        build([file], "s3://nobody/out", settings)
    s3fs.S3FileSystem.clear_instance_cache()
