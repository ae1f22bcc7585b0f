"""A tokenizer's ids are those of its own library on the untouched file, and its tokens' bytes are exact or not believed."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_vocagno.corpus.identity import check_own
from megatron_vocagno.corpus.tokens import Tokenizer, Tokens, open_tokenizer
from megatron_vocagno.errors import TokenizerError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
WORDS = ["the", "quick", "brown", "fox", "a", "1", "42", "é", "ö", "中文", "\n", "\n\n", " ", "  ", "    ", "<br>", "<", "br>"]
WORDS += ["▁", "▁▁", "\t", "</td>", "if x:", "👩‍👩", "."]


def texts(seed: int, n: int = 1500) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choice(WORDS) for _ in range(chosen.randrange(1, 9))) for _ in range(n)]


def added(content: str, i: int, **flags: bool) -> dict[str, Any]:
    return {"id": i, "content": content, "special": False, **dict.fromkeys(FLAGS, False), **flags}


def byte_level(tokens: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """A byte-level BPE of the 256 bytes and some merges; its control token <eos> is number 300."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġ" * 2: 256, "Ġ" * 4: 257, "th": 258, "<b": 259, "<br": 260, "<br>": 261}
    vocab |= {"<eos>": 300}
    merges = [["Ġ", "Ġ"], ["ĠĠ", "ĠĠ"], ["t", "h"], ["<", "b"], ["<b", "r"], ["<br", ">"]]
    eos = added("<eos>", 300, special=True)
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    raw = {"version": "1.0", "added_tokens": [eos, *tokens], "normalizer": None, "pre_tokenizer": pre_tokenizer, "model": model}
    return raw | parts


def spaced(tokens: list[dict[str, Any]], normalizer: Any, pre_tokenizer: Any = None) -> dict[str, Any]:
    """A BPE with byte fallback, whose spaces are U+2581."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "▁a", "▁t", "▁th", "a", "t", "h", "th", "e", "<", "b", "r", ">"]
    pieces += ["<b", "<br", "<br>", "é", "ö", "1", "4", "\n", "\n\n"]
    vocab = {piece: i for i, piece in enumerate(pieces)} | {"</s>": 400}
    merges = [["▁", "▁"], ["▁", "a"], ["▁", "t"], ["▁t", "h"], ["t", "h"], ["<", "b"], ["<b", "r"], ["<br", ">"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True}
    eos = added("</s>", 400, special=True)
    raw = {"version": "1.0", "added_tokens": [eos, *tokens], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return raw | {"model": model}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
NFC = {"type": "NFC"}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def prefixed() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


KINDS: dict[str, dict[str, Any]] = {
    "runs of spaces": byte_level([added(" " * n, 301 + i, normalized=True) for i, n in enumerate((8, 4, 3))], normalizer=NFC),
    "letters": byte_level([added("ö", 301, normalized=True), added("中", 302)]),
    "a letter that is a byte's piece as well": byte_level([added("é", 0), added("ö", 0, normalized=True)]),
    "a piece of the model": byte_level([added("<br>", 261), added("</td>", 301)]),
    "whole words": byte_level([added("fox", 301, single_word=True), added("a", 302, single_word=True)]),
    "spaces before and behind": byte_level([added("<br>", 261, lstrip=True), added("</td>", 301, rstrip=True)]),
    "a prefix in each part": byte_level([added("<br>", 261), added("  ", 301)], pre_tokenizer=prefixed()),
    "Gemma": spaced([added("\n\n", 0), added("<br>", 0), added("▁▁", 0), added("  ", 401)], REPLACE),
    "Llama": spaced([added("<br>", 0), added("</td>", 401, rstrip=True)], LLAMA),
    "Llama, normalized": spaced([added("<br>", 0, normalized=True), added("ö", 0, normalized=True)], LLAMA),
    "Metaspace, always": spaced([added("<br>", 0), added("\n\n", 0)], None, metaspace("always")),
    "Metaspace, first": spaced([added("<br>", 0), added("ö", 0, normalized=True)], None, metaspace("first")),
    "Metaspace, never": spaced([added("<br>", 0), added("  ", 401)], None, metaspace("never")),
}


def opened(raw: dict[str, Any], folder: Path, backend: Any = "auto") -> Tokenizer:
    vocab = raw["model"]["vocab"]
    for token in raw["added_tokens"]:
        token["id"] = vocab.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return open_tokenizer(folder, backend, eos_token="</s>" if "</s>" in vocab else "<eos>")


@pytest.mark.parametrize("backend", ["huggingface", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_untouched_file(kind: str, backend: str, tmp_path: Path) -> None:
    tokenizer = opened(KINDS[kind], tmp_path, backend)
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ordinary = {own.token_to_id(token["content"]) for token in KINDS[kind]["added_tokens"] if not token["special"]}
    met = 0
    for text, tokens in zip(texts(1), tokenizer.encode_batch(texts(1)), strict=True):
        expected = own.encode(text, add_special_tokens=False).ids
        assert tokens.ids.tolist() == expected, text
        met += bool(ordinary & set(expected))
    assert met > 100
    assert check_own(tokenizer, tmp_path, texts(1)[:50]) > 60


def pieces(tokenizer: Tokenizer, folder: Path) -> dict[int, list[bytes]]:
    """Each id's possible texts, found without the code under test: how the library itself decodes its piece, and as it stands."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    alphabet = {c: b for b, c in bytes_to_unicode().items()}
    byte_level = "Ġ" in raw["model"]["vocab"]
    found: dict[int, list[bytes]] = {}
    for piece, i in raw["model"]["vocab"].items():
        if piece.startswith("<0x"):
            spelt = bytes([int(piece[3:5], 16)])
        else:
            spelt = bytes(alphabet[c] for c in piece) if byte_level and i != 300 else piece.replace("▁", " ").encode()
        found[i] = [spelt]
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token in raw["added_tokens"]:
        found.setdefault(own.token_to_id(token["content"]), []).append(token["content"].encode())
    return found


def bytes_to_unicode() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode as table

    return dict(table())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text_or_unknown(kind: str, tmp_path: Path) -> None:
    """Each token's bytes are its piece's, but for a prefix, U+2581 and spaces that the token takes with it."""
    tokenizer = opened(KINDS[kind], tmp_path)
    spelt = pieces(tokenizer, tmp_path)
    placed = 0
    for text, tokens in zip(texts(2), tokenizer.encode_batch(texts(2)), strict=True):
        if tokens.ends_from == "unknown":
            continue
        assert b"".join(tokens.pieces(text)) == text.encode(), text
        for i, piece in zip(tokens.ids.tolist(), tokens.pieces(text), strict=True):
            read = piece.replace("▁".encode(), b" ") if tokenizer.marked else piece
            candidates = [c.replace("▁".encode(), b" ") if tokenizer.marked else c for c in spelt[i]]
            candidates += [c[1:] for c in candidates if c.startswith(b" ")]  # the prefix
            assert any(read == c or read.strip() == c.strip() != b"" for c in candidates), (text, i, piece, candidates)
        placed += 1
    assert placed > 750


def test_an_added_token_that_takes_spaces_does_not_add_up_by_chance(tmp_path: Path) -> None:
    """`<br>` takes one space of the text, and a prefix that is not in the text is put before what follows: the sum fits."""
    raw = spaced([added("<br>", 0, lstrip=True)], LLAMA)
    tokenizer = opened(raw, tmp_path)
    (tokens,) = tokenizer.encode_batch(["a <br>th"])
    lengths = tokenizer.byte_lengths[tokens.ids]
    assert int(lengths.sum()) - 1 == len("a <br>th"), "the case is not met"
    assert tokens.ends_from == "offsets" and tokens.pieces("a <br>th") == [b"a", b" <br>", b"th"]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_with_symbols_of_its_user_gives_sentencepieces_ids(prefix: bool, tmp_path: Path) -> None:
    sentences = ["the quick brown fox jumps over the lazy dog", "a table of numbers 1 2 3", "<br> and more words"] * 100
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<br>", "▁▁", "▁▁▁▁", "\n\n", "<br><br>", "ö", "*+"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        character_coverage=1.0,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokenizer = open_tokenizer(tmp_path)
    symbols = {i for i in range(own.get_piece_size()) if own.id_to_piece(i) in {"<br>", "▁▁", "▁▁▁▁", "\n\n", "<br><br>", "ö"}}
    met, by_table = 0, 0
    tokenizer.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    alone = {"<br>", "\n\n", "<br><br>", "ö", "▁▁"}
    whole = [text for text in texts(3) if text not in alone]  # one that is nothing but a symbol has no dummy prefix here
    for text, tokens, saved in zip(whole, tokenizer.encode_batch(whole), again.encode_batch(whole), strict=True):
        assert tokens.ids.tolist() == saved.ids.tolist() == own.encode(text), text
        assert tokens.n_bytes == len(text.encode()) or tokens.ends_from == "unknown", text
        met += bool(symbols & set(tokens.ids.tolist()))
        by_table += tokens.ends_from == "table"
    assert met > 300 and by_table > 500
    assert check_own(tokenizer, tmp_path) > 20


def test_a_difference_from_the_own_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = opened(KINDS["runs of spaces"], tmp_path, "huggingface")
    other = json.loads(tokenizer.original)
    other["model"]["merges"].remove(["t", "h"])
    object.__setattr__(tokenizer, "original", json.dumps(other).encode())
    told = r"models/mine: texts would not be tokenized as its own library does\. .*: from token \d+ on \['th', "
    with pytest.raises(TokenizerError, match=told + r".* here, \['t', 'h', .* by tokenizers on the original file"):
        check_own(tokenizer, "models/mine")


# ---- what drops text


OMNI = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def removing(pattern: dict[str, str], invert: bool = True) -> dict[str, Any]:
    split = {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": invert}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return byte_level([], pre_tokenizer={"type": "Sequence", "pretokenizers": [split, cut]})


def test_a_split_that_keeps_its_matches_is_taken_where_it_matches_everything(tmp_path: Path) -> None:
    tokenizer = opened(removing({"Regex": OMNI}), tmp_path)
    for text, tokens in zip(texts(4), tokenizer.encode_batch(texts(4)), strict=True):
        assert tokens.ends_from == "table" and tokens.n_bytes == len(text.encode())


@pytest.mark.parametrize(
    ("pattern", "invert"), [({"Regex": OMNI}, False), ({"Regex": r"\p{L}+|\s+|\p{N}"}, True), ({"String": "a"}, True)]
)
def test_a_split_that_drops_text_is_refused(pattern: dict[str, str], invert: bool, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="its pre-tokenizer Split removes parts of the text"):
        opened(removing(pattern, invert), tmp_path)


# ---- prefixes and U+2581


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            spaced([], None, {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, metaspace("always")]}),
            "its pre-tokenizer Metaspace puts a space before each part that Digits cuts, not only before the first part",
        ),
        (
            byte_level([], pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, prefixed()]}),
            "its pre-tokenizer ByteLevel puts a space before each part that Digits cuts, not only before the first part",
        ),
        (byte_level([], pre_tokenizer={"type": "UnicodeScripts"}), "its pre-tokenizer UnicodeScripts removes parts of the text"),
        (
            byte_level([], normalizer={"type": "Prepend", "prepend": "▁"}),
            "its normalizer puts '▁' before a text, and not one space",
        ),
        (byte_level([], normalizer=REPLACE), "the bytes of a space in its pieces are ambiguous"),
        (
            spaced([], None, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}),
            "its pre-tokenizer Metaspace writes '_' for a space, not U+2581",
        ),
    ],
)
def test_what_puts_spaces_where_the_text_has_none_is_refused(raw: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=re.escape(reason)):
        opened(raw, tmp_path)


def test_u2581_in_a_text_is_never_believed_to_add_up(tmp_path: Path) -> None:
    tokenizer = opened(spaced([], LLAMA), tmp_path)
    for text in ("a1a▁", "▁", "▁a", "th ▁▁ a", "▁中"):
        (tokens,) = tokenizer.encode_batch([text])
        assert tokenizer.prefixes([text]).tolist() == [255]
        assert tokens.ends_from == "offsets" and b"".join(tokens.pieces(text)) == text.encode(), text


def test_a_text_that_begins_with_u2581_gets_a_prefix_of_byte_level(tmp_path: Path) -> None:
    tokenizer = opened(byte_level([], pre_tokenizer=prefixed()), tmp_path)
    for text in ("▁a", "a", " a"):
        (tokens,) = tokenizer.encode_batch([text])
        assert tokens.ends_from == "table" and b"".join(tokens.pieces(text)) == text.encode()


def test_a_text_that_its_tokenizer_composes_does_not_add_up_by_chance(tmp_path: Path) -> None:
    """e + U+0301 loses a byte, U+FB2A gains one."""
    tokenizer = opened(byte_level([], normalizer=NFC), tmp_path)
    text = "cafe\u0301 \ufb2a home"
    (tokens,) = tokenizer.encode_batch([text])
    assert int(tokenizer.byte_lengths[tokens.ids].sum()) == len(text.encode()), "the case is not met"
    assert tokens.ends_from == "unknown"
    composed: Tokens = tokenizer.encode_batch(["caf\u00e9 home"])[0]
    assert composed.ends_from == "table"


def test_the_ids_of_tokens_that_share_one_with_a_piece_are_unsure(tmp_path: Path) -> None:
    tokenizer = opened(KINDS["a letter that is a byte's piece as well"], tmp_path)
    assert len(tokenizer.unsure) == 2 and not np.any(tokenizer.short_byte_lengths[tokenizer.unsure])
