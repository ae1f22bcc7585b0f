"""Local, in memory and on an object store: the same files, pieces and documents."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.documents import read
from megatron_vocagno.preprocess.inputs import CUT_BYTES, cut, find
from tests import tokenizers_for_tests as real
from tests.corpus.formats import CONTAINERS, lines, parquet, read_all, write


@pytest.fixture(scope="module")
def bucket():
    """A real S3 server on this machine, found as any other is: by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # all servers of a process share what they hold: another module's is forgotten
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def remote(request) -> str:
    return "memory://folder" if request.param == "memory" else f"{request.getfixturevalue('bucket')}/folder"


def upload(folder: Path, root: str) -> Place:
    for file in folder.rglob("*"):
        if file.is_file():
            (place(root) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return place(root)


def test_every_place_gives_the_same(remote, tmp_path):
    texts = real.texts()[:40]
    data = lines(texts)
    for (name, suffix), pack in CONTAINERS.items():
        write(tmp_path / f"data/{name}/a.jsonl{suffix}", pack(data))
    write(tmp_path / "data/b.parquet", parquet({"text": texts, "id": list(range(40))}, row_group_size=7))
    write(tmp_path / "data/c.txt", texts[0].encode())
    write(tmp_path / "data/_temporary/d.jsonl", data)
    here, there = str(tmp_path), str(upload(tmp_path, remote))
    for patterns in ([""], ["/data/*.txt", "/data"], ["/data/*/*.gz", "/data/**/*.zst"], ["/data/b.parquet"]):
        local, remotes = ([str(f) for f in find([root + p for p in patterns])] for root in (here, there))
        assert remotes and remotes == [there + name.removeprefix(here) for name in local]
    pieces = [[piece for file in find([root]) for piece in cut(file, 50_000)] for root in (here, there)]
    (documents, digest), (others, other) = (read_all(p, id_key="id") for p in pieces)
    assert digest == other and len(documents) == len(others) > 600
    assert [d[1:] for d in documents] == [d[1:] for d in others]
    assert [str(d).removeprefix(here) for d in documents] == [str(d).removeprefix(there) for d in others]


def test_an_object_store_is_asked_for_what_is_read(bucket, tmp_path, monkeypatch):
    data = lines("x" * 5000 for _ in range(4000))
    upload(write(tmp_path / "big.jsonl", data).parent, bucket)
    fetched: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counting(self, start, end):
        fetched.append(end - start)
        return fetch(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counting)
    pieces = cut(place(f"{bucket}/big.jsonl"), 4 << 20)
    assert len(pieces) == 5 and 0 < sum(fetched) <= 5 * CUT_BYTES
    fetched.clear()
    documents, _ = read_all(pieces[1:2])
    assert sum(fetched) == pieces[1].stop - pieces[1].start and len(documents) > 800


def test_an_object_that_changes_while_it_is_read_is_noticed(bucket, tmp_path):
    upload(write(tmp_path / "x/changing.jsonl", lines("x" * 10_000 for _ in range(4000))).parent, bucket)
    file = place(f"{bucket}/changing.jsonl")
    documents = read(cut(file, 10**9)[0], "text", None, len)
    assert next(documents).text == "x" * 10_000
    upload(write(tmp_path / "x/changing.jsonl", lines("y" * 10_000 for _ in range(4000))).parent, bucket)
    with pytest.raises(OSError, match="no longer exists"):
        list(documents)


def test_what_is_missing_on_an_object_store_is_named(bucket):
    for pattern in (f"{bucket}/nope.jsonl", f"{bucket}/*.nope", "s3://nobucket/a.jsonl"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            find([pattern])
    with pytest.raises(CorpusError, match="no such file"):
        cut(place(f"{bucket}/nope.jsonl"), 100)
