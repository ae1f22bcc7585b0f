"""What a build of a dataset says: of its input, its options, and what lies in its way."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from inline_snapshot import snapshot

from megatron_vocagno.corpus.places import place, reaching
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import documents, ray_engine, workers
from megatron_vocagno.preprocess.build import build, finish, locked
from megatron_vocagno.preprocess.inputs import cut, find
from megatron_vocagno.preprocess.plan import Slice, plan
from megatron_vocagno.preprocess.ray_engine import run_ray
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.errors.telling import readable, told
from tests.tokenizers_for_tests import mistral_tokenizer_path


def write(file: Path, data: bytes | str) -> Path:
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with told(snapshot("DIR/corpus.jsonl: no such file or folder"), DIR=tmp_path):
        find([str(tmp_path / "corpus.jsonl")])
    with told(
        snapshot("DIR: no *.jsonl, *.ndjson, *.json, *.txt (perhaps .gz, .zst, .bz2, .xz) or *.parquet in this folder"),
        DIR=tmp_path,
    ):
        find([str(tmp_path)])
    with told(snapshot("DIR/list.txt: this list contains no file names"), DIR=tmp_path):
        find([f"@{write(tmp_path / 'list.txt', '# nothing yet')}"])
    with told(
        snapshot("cannot read DIR/nowhere.txt: FileNotFoundError: [Errno 2] No such file or directory: 'DIR/nowhere.txt'"),
        DIR=tmp_path,
    ):
        find([f"@{tmp_path / 'nowhere.txt'}"])
    with told(snapshot("DIR/gone.jsonl: no such file"), DIR=tmp_path):
        cut(tmp_path / "gone.jsonl", 100)
    with told(snapshot("cannot open s4://bucket/data: Unsupported filesystem: 's4'")):
        place("s4://bucket/data")
    with told(snapshot("cannot use memory://data: RuntimeError: 403 Forbidden")), reaching(place("memory://data")):
        raise RuntimeError("403 Forbidden")


def test_inputs_of_another_format(tmp_path: Path, teacher_tokenizer: Path) -> None:
    with told(
        snapshot("DIR/paper.pdf is a PDF, RTF or WARC file, not JSON lines, parquet or plain text: extract its text"),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "paper.pdf", b"%PDF-1.7"), 100)
    with told(
        snapshot("DIR/a.jsonl.gz is called .gz, but its first bytes are b'{\"text\":': plain text? Rename it"),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "a.jsonl.gz", '{"text": "plain"}\n'), 100)
    with told(
        snapshot("DIR/b.jsonl.zst is called .zst, but its first bytes are b'BZh91AY&': that is bzip2: rename it"),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "b.jsonl.zst", bz2.compress(b"{}\n")), 100)
    with told(snapshot("DIR/c.gz is called .gz, but its first bytes are b'\\x1e\\x8b\\x08\\x00': is it damaged?"), DIR=tmp_path):
        cut(write(tmp_path / "c.gz", b"\x1e\x8b\x08\0"), 100)
    with told(
        snapshot(
            "DIR/a.json is one JSON array, not JSON with one document per line: convert it, e.g. jq -c '.[]' FILE > FILE.jsonl"
        ),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "a.json", '[\n{"text": "one"}\n]'), 100)
    with told(
        snapshot(
            "DIR/a.json.gz is JSON over several lines, not JSON with one document per line: convert it, e.g. gzip -dc FILE | jq -c . > FILE.jsonl"
        ),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "a.json.gz", gzip.compress(b'{\n"text": "one"\n}')), 100)
    with told(
        snapshot(
            "DIR/a.parquet: damaged parquet data (Parquet file size is 4 bytes, smaller than the minimum file "
            "footer (8 bytes)): is it complete?"
        ),
        DIR=tmp_path,
    ):
        cut(write(tmp_path / "a.parquet", b"PAR1"), 100)
    settings = BuildConfig(str(teacher_tokenizer), str(teacher_tokenizer))
    with told(snapshot("'DIR/caf\\udce9.txt': a file name that is not UTF-8 cannot be recorded; rename it"), DIR=tmp_path):
        plan([write(tmp_path / os.fsdecode(b"caf\xe9.txt"), "text")], settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["text"]', snapshot("a list, not a JSON object")),
        ('{"content": "x"}', snapshot("no key 'text' (it has 'content'); --text-key names another")),
        ('{"text": 7}', snapshot("'text' is a number, not a string")),
        ('{"text": null}', snapshot("'text' is null, not a string")),
        ('{"text": "x"}', snapshot("no key 'id' (it has 'text'); --id-key names another")),
        ('{"text": "x", "id": [1]}', snapshot("'id' is a list, not a string or an integer")),
        (
            '{"text": "x"',
            snapshot(
                "invalid JSON (Expecting ',' delimiter: line 1 column 13 (char 12)): "
                "cut off, or one object over several lines? Then jq -c . FILE > FILE.jsonl joins them"
            ),
        ),
        (b'{"text": "\xff"}', snapshot("invalid UTF-8 at byte 10 of the line")),
        ('{"a": ' * 99_999, snapshot("nested too deeply: more than some thousand lists and objects within each other")),
        (
            "Words.",
            snapshot(
                "invalid JSON (Expecting value: line 1 column 1 (char 0)): plain text? That is read from files that are called *.txt"
            ),
        ),
        ('{"text": "\\ud800"}', snapshot("a lone surrogate at character 0 of 'text'")),
    ],
)
def test_records_without_a_text(tmp_path: Path, line: str | bytes, message: str) -> None:
    (piece,) = cut(write(tmp_path / "a.jsonl", line), 10**6)
    (document,) = documents.read(piece, "text", "id", lambda _: None)
    assert document.reason == message


def test_compressed_data_that_give_no_more(tmp_path: Path) -> None:
    line, file = b'{"text": "one"}\n', tmp_path / "a.jsonl"
    trained = zstd.train_dict([b"some words of sample %d" % (i * 7919) for i in range(999)], 1000)
    for data, message in (
        (gzip.compress(line)[:-1], snapshot("broken input: the gzip data ends in the middle: cut off?")),
        (
            gzip.compress(line) + b"END",
            snapshot("broken input: at byte 36 of the file its gzip data end, and what follows is something else: b'END'"),
        ),
        (b"\x1f\x8b\x08\xff" + line, snapshot("broken input: damaged gzip data (flags 0xff in a header: RFC 1952 has no such)")),
        (
            zstd.compress(line, zstd_dict=trained),
            snapshot("broken input: zstd data that were packed with a dictionary (ID): unpack them with it (zstd -d -D)"),
        ),
    ):
        *_, broken = documents.read(cut(write(file, data), 10**6)[0], "text", None, lambda _: None)
        assert broken.reason is not None and readable(broken.reason, {"ID": trained.dict_id}) == message


def test_columns_of_parquet_without_text(tmp_path: Path) -> None:
    def read(table: pa.Table, text_key: str) -> None:
        pq.write_table(table, tmp_path / "a.parquet")
        list(documents.read(cut(tmp_path / "a.parquet", 10**6)[0], text_key, None, lambda _: None))

    table = pa.table({"body": ["one"], "n": [1]})
    with told(snapshot("DIR/a.parquet: no column 'text' (it has 'body', 'n'); --text-key names another"), DIR=tmp_path):
        read(table, "text")
    with told(
        snapshot("DIR/a.parquet: column 'n' is int64, not strings (these are: 'body'); --text-key names another"), DIR=tmp_path
    ):
        read(table, "n")
    with told(snapshot("DIR/a.parquet: 2 columns are called 'text': rename all but one"), DIR=tmp_path):
        read(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "text")


def test_what_a_build_refuses_before_it_works(tmp_path: Path, teacher_tokenizer: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    settings = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer))
    with told(snapshot("--force with --shards: other tasks may use the shards that --force removes. Use another --out")):
        build([corpus], tmp_path / "out", settings, force=True, part=Slice(1, 2))
    with told(snapshot("--shards 3/2: the first number must be from 1 to the second")):
        Slice(3, 2)
    with told(snapshot("DIR/corpus.jsonl is a file, and a dataset is a folder: use another --out"), DIR=tmp_path):
        build([corpus], corpus, settings)
    with told(snapshot("DIR is not empty and contains no dataset: use another --out"), DIR=tmp_path):
        build([corpus], tmp_path, settings)
    with told(
        snapshot(
            "DIR/out has no plan (.build/plan.json): no build was started there. Start one, or run it once without --shards"
        ),
        DIR=tmp_path,
    ):
        finish(tmp_path / "out", settings)
    with (
        told(
            snapshot(
                "another build or scoring is using DIR/out (DIR/out/.build/lock is locked): wait for it, or use another folder"
            ),
            DIR=tmp_path,
        ),
        locked(tmp_path / "out", None),
        locked(tmp_path / "out", None),
    ):
        pass


def test_a_plan_tells_which_setting_or_file_is_another_one(tmp_path: Path, teacher_tokenizer: Path) -> None:
    lines = [json.dumps({"text": f"line {i}", "id": i}) + "\n" for i in range(4)]
    corpus = write(tmp_path / "corpus.jsonl", "".join(lines))
    moved = shutil.copytree(teacher_tokenizer, tmp_path / "moved")
    teacher, mistral = open_tokenizer(teacher_tokenizer), open_tokenizer(mistral_tokenizer_path())
    settings = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer), id_key="id")
    first = plan([corpus], settings, 40)
    assert first.other_settings(plan([corpus], replace(settings, teacher=str(moved)), 40)) == ""

    def told_of(**changes: Any) -> str:
        return first.other_settings(plan([corpus], replace(settings, **changes), 40))

    assert told_of(id_key=None) == snapshot("--id-key id then, none now")
    assert told_of(text_key="body", on_bad_line="skip") == snapshot("--text-key text then, body now")
    assert told_of(on_bad_line="skip") == ""  # each shard with bad records is compared instead
    names = {
        "THEN": teacher.fingerprint,
        "NOW": mistral.fingerprint,
        "TEACHER": teacher_tokenizer,
        "MISTRAL": mistral_tokenizer_path(),
    }
    assert readable(told_of(teacher=str(mistral_tokenizer_path())), names) == snapshot(
        "--teacher THEN (TEACHER) then, NOW (MISTRAL) now; --teacher-eos <|endoftext|> then, </s> now"
    )
    assert told_of(student_eos="<|im_end|>").endswith("--student-eos <|endoftext|> then, <|im_end|> now")
    # what this release would not know to be a setting is told, too
    assert first.other_settings(first.model_copy(update={"settings": "f00d"})).startswith("another release planned it (")
    old = first.model_copy(update={"in_words": None})
    assert "an older release planned it" in old.other_settings(plan([corpus], replace(settings, id_key=None), 40))

    assert first.other_input(plan([corpus], settings, 80)) == (
        snapshot("same names and sizes, split differently: did their lines, --shard-mb or --max-documents change?")
    )
    second = write(tmp_path / "more.jsonl", lines[0])
    assert first.other_input(plan([corpus, second], settings, 40)) == snapshot("no file then, more.jsonl of 28 bytes now")
    write(corpus, "".join(lines[:2]))
    assert first.other_input(plan([corpus], settings, 40)) == snapshot(
        "corpus.jsonl of 112 bytes then, corpus.jsonl of 56 bytes now"
    )
    with told(
        snapshot(
            """\
DIR/out was planned with other input: corpus.jsonl of 56 bytes then, more.jsonl of 28 bytes now.
  1 shard then, 1 now. Use another --out, or --force.\
"""
        ),
        DIR=tmp_path,
    ):
        for name in (corpus, second):
            build([name], tmp_path / "out", settings, shard_bytes=40)


def test_what_a_build_refuses_of_an_earlier_one(tmp_path: Path, teacher_tokenizer: Path) -> None:
    text = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(4))
    corpus, out = write(tmp_path / "corpus.jsonl", text), tmp_path / "out"
    settings = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer))
    other = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer), nfc=False)
    names = {"DIR": tmp_path, "THIS": settings.sha256, "OTHER": other.sha256}
    os.utime(corpus, ns=(0, 5))
    build([corpus], out, settings, shard_bytes=40, part=Slice(1, 2))
    with told(
        snapshot(
            """\
DIR/out was planned with other settings: --no-nfc absent then, given now.
  2 shards then, 2 now. Use another --out, or --force.\
"""
        ),
        **names,
    ):
        build([corpus], out, other, shard_bytes=40, part=Slice(2, 2))
    with told(
        snapshot(
            """\
DIR/out was planned with other settings: --no-nfc absent then, given now.
  Pass finalize the same options as the build.\
"""
        ),
        **names,
    ):
        finish(out, other)
    with told(
        snapshot(
            "DIR/out: 1 of 2 shards are missing: 0001. Run their tasks again, or the command without --shards. Do all machines see this folder?"
        ),
        **names,
    ):
        finish(out, settings)
    os.utime(corpus, ns=(0, 0))
    with told(
        snapshot(
            "DIR/out: the input has changed since another task of this job array planned it: ('corpus.jsonl', 76, '5') then, ('corpus.jsonl', 76, '0') now (size, time). Run the build once without --shards, or use another --out"
        ),
        **names,
    ):
        build([corpus], out, settings, shard_bytes=40, part=Slice(2, 2))
    build([corpus], out, settings, shard_bytes=40)
    (out / "shards" / "0009").mkdir()
    with told(
        snapshot(
            "DIR/out/shards/0009 is not part of this plan of 2 shards: other input or --shard-mb? Use another --out, or --force, which removes it"
        ),
        **names,
    ):
        build([corpus], out, settings, shard_bytes=40)
    (out / "shards" / "0009").rmdir()
    (out / ".build" / "plan.json").unlink()
    with told(
        snapshot(
            "DIR/out/shards/0000 was made from other settings or tokenizers: THIS then, OTHER now. Use another --out, or rebuild it with --force"
        ),
        **names,
    ):
        build([corpus], out, other, shard_bytes=40)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('{"body": "x"}', "Use --text-key KEY to read another key"),
        ("id,text", "If this is CSV, convert it to JSON lines or parquet"),
        ("Once upon, a time", "Use --on-bad-line skip to drop such records, or quarantine to keep them"),
    ],
)
def test_advice_for_the_first_line_of_a_file(line: str, advice: str, tmp_path: Path, teacher_tokenizer: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", line)
    with pytest.raises(CorpusError, match=rf"\n  {advice}$"):
        build([corpus], tmp_path / "out", BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer)))


def test_what_a_build_says_when_records_are_bad(tmp_path: Path, teacher_tokenizer: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", '{"text": "one"}\n{"body": "two"}\n')
    settings = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer))
    with told(
        snapshot(
            """\
1 of 1 shards could not be built; the finished shards are kept
shard 0000: DIR/corpus.jsonl:2:16: no key 'text' (it has 'body'); --text-key names another: b'{"body": "two"}'
  Use --on-bad-line skip to drop such records, or quarantine to keep them\
"""
        ),
        DIR=tmp_path,
    ):
        build([corpus], tmp_path / "out", settings)
    lenient = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer), on_bad_line="skip")
    with told(
        snapshot(
            "1 of 2 records are bad (50.00%); --max-bad-fraction allows 0.10%. Look at them (--on-bad-line quarantine --force rebuilds the shards with bad records, and stores these), or allow more"
        )
    ):
        build([corpus], tmp_path / "lenient", lenient, max_bad_fraction=0.001)
    with told(snapshot("no document was read: the input files are empty")):
        build([write(tmp_path / "empty.jsonl", "")], tmp_path / "none", settings)
    with told(
        snapshot(
            "no document is left: 1 were empty, 0 lines were bad, the tokens of 0 did not cover their text. Is "
            "--text-key the key of the text?"
        )
    ):
        build([write(tmp_path / "blank.jsonl", '{"text": ""}\n')], tmp_path / "blank", settings)


def test_a_ray_cluster_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(address: str) -> None:
        list(run_ray(len, ["job"], address=address))

    with told(snapshot("--ray-address somewhere: expected 'auto' or HOST:PORT")):
        run("somewhere")
    with told(
        snapshot("no Ray cluster answers at 127.0.0.1:1 ([Errno 111] Connection refused): is it running, and is the port open?")
    ):
        run("127.0.0.1:1")
    with pytest.raises(CorpusError, match="no Ray cluster answers"):
        run("127.0.0.1:99999")
    monkeypatch.setitem(sys.modules, "ray", None)
    with told(snapshot("Ray is not installed: pip install 'megatron-vocagno[ray]'")):
        run("auto")


def test_a_ray_cluster_that_refuses_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: type(name, (Exception,), {}) for name in ("AuthenticationError", "LocalRayletDiedError", "RayTaskError")}
    ray: Any = SimpleNamespace(exceptions=SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "ray", ray)

    def fail(error: Exception) -> Any:
        def raise_it(*_: object, **__: object) -> None:
            raise error

        return raise_it

    ray.init = fail(kinds["AuthenticationError"]())
    with told(
        snapshot(
            "this process has no token for the Ray cluster: set RAY_AUTH_TOKEN_PATH to the token's file, or copy it to ~/.ray/auth_token. For a cluster without authentication, set RAY_AUTH_MODE=disabled"
        )
    ):
        ray_engine._connect("auto")
    ray.init = fail(ConnectionError("Could not find any running Ray instance."))
    with told(
        snapshot(
            """\
cannot use the Ray cluster at auto: Could not find any running Ray instance.
  If it is running, check its token (RAY_AUTH_TOKEN_PATH) and its version of Ray\
"""
        )
    ):
        ray_engine._connect("auto")
    ray.get = fail(kinds["LocalRayletDiedError"]())
    with told(snapshot("Ray has ended on this machine; the next run will reuse the finished shards")):
        ray_engine._answer(ray, None)
    task_error = kinds["RayTaskError"]()
    task_error.cause = ModuleNotFoundError("No module named 'megatron_vocagno'")  # type: ignore[attr-defined]
    ray.get = fail(task_error)
    with told(
        snapshot(
            "the task cannot run on the cluster: No module named 'megatron_vocagno' (the nodes need the same "
            "version of this package, and the same Python)"
        )
    ):
        ray_engine._answer(ray, None)


class Pipe(int):
    """A number may be a key."""

    def close(self) -> None:
        pass


def test_workers_that_cannot_start() -> None:
    process = SimpleNamespace(join=lambda timeout=None: None, kill=lambda: None, exitcode=1)
    worker: Any = SimpleNamespace(pipe=Pipe(), process=process, entry=None, ready=False, death="with status 1")
    pool: Any = SimpleNamespace(workers={0: worker}, false_starts=0)
    with told(snapshot("workers cannot start: the last one died with status 1; see its output above")):
        list(workers._WorkerPool._remove_dead(pool, worker))
