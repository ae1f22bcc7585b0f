"""What a tokenizer is told that cannot be opened, or whose tokens would lose bytes of a text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inline_snapshot import snapshot

from megatron_vocagno.corpus.encoders import open_encoder
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import EncoderError
from tests.errors.telling import told
from tests.runs import REPOSITORY
from tests.tokenizers_for_tests import mistral_tokenizer_path

BYTES = [*"!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"]
RAW: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate([*BYTES, "<eos>"])}, "merges": []},
}

CHANGES: list[tuple[dict[str, Any], str]] = [
    (
        {"normalizer": {"type": "NFKC"}},
        snapshot("DIR/tokenizer.json: its normalizer changes the text (NFKC): byte positions would not be the text's"),
    ),
    (
        {"pre_tokenizer": {"type": "Whitespace"}},
        snapshot("DIR/tokenizer.json: its pre-tokenizer Whitespace removes parts of the text"),
    ),
    (
        {"pre_tokenizer": None},
        snapshot(
            "DIR/tokenizer.json: neither byte-level nor with byte fallback: characters outside its vocabulary would be lost"
        ),
    ),
    (
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
        snapshot("DIR/tokenizer.json: its model is WordPiece, which may lose bytes of the text; only BPE is supported"),
    ),
    (
        {"model": {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": [], "end_of_word_suffix": "</w>"}},
        snapshot("DIR/tokenizer.json: its pieces carry a subword prefix or suffix that is not in the text"),
    ),
    (
        {"model": {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": ["a b"]}},
        snapshot("DIR/tokenizer.json: the tokenizers library refuses it: Token `b` out of vocabulary at line 1 column 292"),
    ),
]


@pytest.mark.parametrize("opened", [open_tokenizer, front_ids])
def test_a_gguf_file_is_no_tokenizer_and_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path], object]
) -> None:
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1 << 40)  # a hole, larger than memory
    monkeypatch.chdir(REPOSITORY)
    with told(
        snapshot(
            """\
DIR/x.gguf is a GGUF file, which is not read as a tokenizer. Convert it, and specify the folder:
  python -m tools.convert.gguf_to_safetensors DIR/x.gguf --out DIR/x\
"""
        ),
        DIR=tmp_path,
    ):
        opened(tmp_path / "x.gguf")


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=range(len(CHANGES)))
def test_a_tokenizer_that_would_lose_bytes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(copy.deepcopy(RAW) | changes))
    with told(message, DIR=tmp_path):
        open_tokenizer(tmp_path, eos_token="<eos>", backend="huggingface")


def test_a_tokenizer_without_its_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(RAW))
    with told(
        snapshot(
            "DIR/tokenizer.json: no file next to it names an end-of-text token: pass eos_token=…, --student-eos or --teacher-eos"
        ),
        DIR=tmp_path,
    ):
        open_tokenizer(tmp_path)
    with told(snapshot("DIR/tokenizer.json: the end-of-text token '</s>' is not among its 95 tokens"), DIR=tmp_path):
        open_tokenizer(tmp_path, eos_token="</s>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with told(
        snapshot(
            "DIR/tokenizer.json: DIR/tokenizer_config.json: not valid JSON: unexpected end of data: line 1 column 2 (char 1)"
        ),
        DIR=tmp_path,
    ):
        open_tokenizer(tmp_path)


def test_what_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with told(snapshot("cannot open the tokenizer DIR/nowhere: no such file or folder"), DIR=tmp_path):
        open_tokenizer(tmp_path / "nowhere")
    with told(snapshot("cannot open the tokenizer DIR: a folder without tokenizer.json or tokenizer.model"), DIR=tmp_path):
        open_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    with told(
        snapshot(
            """\
cannot open the tokenizer models/tiny/tokenizer: no such file or folder. The name counts as a path, because a Hub id has the form org/name or org/name@revision.
  The absolute path is DIR/models/tiny/tokenizer: relative paths start at the folder in which you run the command.\
"""
        ),
        DIR=tmp_path,
    ):
        open_tokenizer("models/tiny/tokenizer")
    (tmp_path / "tekken.json").write_text('{"config": {}}')
    with told(
        snapshot("DIR/tekken.json: JSON, but not a tokenizer.json of Hugging Face tokenizers: it has no 'model'"), DIR=tmp_path
    ):
        open_tokenizer(tmp_path / "tekken.json")
    (tmp_path / "noise.model").write_bytes(b"\xff\xfe\x00 noise")
    with told(snapshot("DIR/noise.model: neither JSON nor a SentencePiece model (9 bytes)"), DIR=tmp_path):
        open_tokenizer(tmp_path / "noise.model")
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with told(
        snapshot("DIR/tokenizer.json is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder."),
        DIR=tmp_path,
    ):
        open_tokenizer(tmp_path)
    with told(snapshot("no tokenizer backend 'rust'; there are 'auto', 'gigatoken', 'huggingface'")):
        open_tokenizer(mistral_tokenizer_path(), backend="rust")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "trainer_spec",
            "model_type",
            1,
            snapshot("DIR/x.model: its model is not BPE (Unigram, word or char); only BPE is supported"),
        ),
        (
            "trainer_spec",
            "byte_fallback",
            False,
            snapshot("DIR/x.model: it has no byte fallback: characters outside its vocabulary would be lost"),
        ),
        (
            "normalizer_spec",
            "remove_extra_whitespaces",
            True,
            snapshot("DIR/x.model: its normalizer 'identity' changes the text"),
        ),
    ],
)
def test_a_sentencepiece_model_that_would_lose_bytes(tmp_path: Path, part: str, name: str, value: Any, message: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(mistral_tokenizer_path().read_bytes())
    setattr(getattr(proto, part), name, value)
    (tmp_path / "x.model").write_bytes(proto.SerializeToString())
    with told(message, DIR=tmp_path):
        open_tokenizer(tmp_path / "x.model")


def test_a_long_reason_of_gigatoken_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes) -> None:
        raise ValueError(reason)

    monkeypatch.setattr("gigatoken.Tokenizer", SimpleNamespace(from_json=refuse))
    for length, end in ((103, "x" * 103), (104, "x" * 102 + "…"), (600, "x" * 102 + "…")):
        reason = "unknown pattern: " + "x" * length
        with pytest.raises(EncoderError, match=f"^gigatoken cannot read it: unknown pattern: {end}$"):
            open_encoder(json.dumps(RAW).encode(), "gigatoken")


def test_gigatoken_that_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = json.dumps(RAW).encode()
    with told(snapshot("gigatoken cannot read it: Byte remapping failed: no single-byte vocab entry for byte 0x00")):
        open_encoder(plain, "gigatoken")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with told(snapshot("gigatoken is not installed: pip install 'megatron-vocagno[fast]'")):
        open_encoder(plain, "gigatoken")
