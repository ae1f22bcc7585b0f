"""Byte ends of real tokenizers, the SentencePiece conversion, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import sentencepiece

from megatron_vocagno.corpus.tokens import Tokens, ends_from_offsets, open_tokenizer
from megatron_vocagno.errors import TokenizerError
from tests.tokenizers_for_tests import mistral_tokenizer_path

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@pytest.fixture(scope="module")
def smollm2_json(smollm2_folder):
    return json.loads((smollm2_folder / "tokenizer.json").read_text(encoding="utf-8"))


def open_json(raw, folder, **options):
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return open_tokenizer(folder, **options)


def small_bpe(**parts):
    """A byte-level BPE of the 256 bytes and <eos>, with parts replaced."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    eos = {"id": 256, "content": "<eos>", "special": True, **dict.fromkeys(FLAGS, False)}
    raw = {"version": "1.0", "added_tokens": [eos], "normalizer": None}
    raw["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    raw["model"] = {"type": "BPE", "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": []}
    return raw | parts


def test_sentencepiece_conversion_gives_sentencepiece_ids(mistral, texts):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer_path()))
    met = 0
    for text, tokens in zip(texts, mistral.encode_batch(texts), strict=True):
        assert tokens.ids.tolist() == reference.encode(text), text[:60]
        met += len(tokens.ids)
    assert met > 100_000


def test_the_mistral_vocabulary_is_the_one_meant(mistral):
    piece = json.loads(mistral.source)["model"]["vocab"]
    assert piece["▁Hello"] == 22557  # 15043 would be Llama-2's
    assert (mistral.vocab_size, mistral.eos_id, mistral.eos_token) == (32_000, 2, "</s>")


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_each_token_spells_the_bytes_between_its_start_and_its_end(name, texts, request):
    """Against the bytes that the vocabulary itself spells, piece by piece."""
    tokenizer = request.getfixturevalue(name)
    pieces = {i: piece for piece, i in json.loads(tokenizer.source)["model"]["vocab"].items()}
    spell = speller(name)
    met = 0
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokens.ends_from == "offsets":
            continue
        data = text.encode()
        for k, (i, start, end) in enumerate(zip(tokens.ids.tolist(), tokens.starts.tolist(), tokens.ends.tolist(), strict=True)):
            # Mistral's dummy prefix belongs to the first token and is not in the text
            prefix = b" " if name == "mistral" and k == 0 else b""
            assert prefix + data[start:end] == spell(pieces[i]), (text[:50], k)
            met += 1
    assert met > 50_000


def speller(name):
    """piece -> its bytes, as transformers decodes them."""
    if name == "mistral":
        return lambda p: bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode()
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {c: b for b, c in bytes_to_unicode().items()}
    return lambda p: bytes(back[c] for c in p)


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_ends_reach_the_end_of_every_text_and_never_fall(name, texts, request):
    ends_from = set()
    for text, tokens in zip(texts, request.getfixturevalue(name).encode_batch(texts), strict=True):
        assert tokens.ids.dtype == np.int32 and tokens.ends.dtype == np.int64
        assert tokens.n_bytes == len(text.encode()) and tokens.ends_from != "unknown"
        # only a dummy prefix that stands alone, at byte 0, has no text
        assert np.all(np.diff(tokens.ends) > 0) and tokens.ends[0] >= 0
        ends_from.add(tokens.ends_from)
    # U+2581 in a text is three bytes, as a piece one: SentencePiece's table cannot know, the offsets do
    assert ends_from == ({"table", "offsets"} if name == "mistral" else {"table"})


def test_control_tokens_in_a_text_are_plain_text(mistral, smollm2):
    for tokenizer, literal in ((mistral, "</s>"), (mistral, "<s>"), (smollm2, "<|im_start|>"), (smollm2, "<|endoftext|>")):
        (tokens,) = tokenizer.encode_batch([f"a {literal} b {literal}"])
        control = {a["id"] for a in json.loads(tokenizer.source)["added_tokens"]}
        assert literal in {a["content"] for a in json.loads(tokenizer.source)["added_tokens"]}
        assert not control & set(tokens.ids.tolist()), literal


def test_a_control_token_is_out_of_reach_of_merges_and_whole_words(tmp_path):
    raw = small_bpe()
    raw["model"]["vocab"] |= {"ab": 256, "abc": 257}
    raw["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    raw["added_tokens"] = [{"id": 257, "content": "abc", "special": True, **dict.fromkeys(FLAGS, False)}]
    for ignore_merges in (False, True):
        raw["model"]["ignore_merges"] = ignore_merges
        (tokens,) = open_json(raw, tmp_path, eos_token="abc").encode_batch(["abc"])
        assert 257 not in tokens.ids and tokens.ends.tolist() == [2, 3]


def test_empty_text_has_no_tokens(mistral, smollm2):
    for tokenizer in (mistral, smollm2):
        (tokens,) = tokenizer.encode_batch([""])
        assert len(tokens.ids) == len(tokens.ends) == len(tokens.starts) == tokens.n_bytes == 0


def test_saved_tokenizer_is_the_same_and_transformers_loads_it(mistral, smollm2, tmp_path, texts):
    from transformers import PreTrainedTokenizerFast

    for name, tokenizer in (("m", mistral), ("s", smollm2)):
        tokenizer.save(tmp_path / name)
        again = open_tokenizer(tmp_path / name)
        assert (again.fingerprint, again.eos_id, again.source) == (tokenizer.fingerprint, tokenizer.eos_id, tokenizer.source)
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert loaded.eos_token_id == tokenizer.eos_id
        plain = [t for t in texts if "<" not in t][:30]
        for text, tokens in zip(plain, tokenizer.encode_batch(plain), strict=True):
            assert loaded.encode(text, add_special_tokens=False) == tokens.ids.tolist()


def test_fingerprint_changes_with_what_decides_ids_and_with_nothing_else(smollm2, smollm2_json, tmp_path):
    same = copy.deepcopy(smollm2_json) | {
        "decoder": None,
        "truncation": {"max_length": 8, "stride": 0, "strategy": "LongestFirst"},
    }
    same["truncation"]["direction"] = "Right"
    same["model"] |= {"dropout": None, "ignore_merges": False, "unk_token": None}
    same["model"]["merges"] = [m.split(" ") for m in same["model"]["merges"]]
    assert open_json(same, tmp_path, eos_token="<|endoftext|>").fingerprint == smollm2.fingerprint
    assert open_json(same, tmp_path, eos_token="<|im_end|>").fingerprint != smollm2.fingerprint
    other = copy.deepcopy(smollm2_json)
    other["model"]["merges"][5], other["model"]["merges"][6] = other["model"]["merges"][6], other["model"]["merges"][5]
    assert open_json(other, tmp_path, eos_token="<|endoftext|>").fingerprint != smollm2.fingerprint


def test_truncation_padding_dropout_of_a_tokenizer_json_do_not_touch_the_text(smollm2, smollm2_json, tmp_path, texts):
    raw = copy.deepcopy(smollm2_json)
    raw["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    raw["model"]["dropout"] = 0.5
    tokenizer = open_json(raw, tmp_path, eos_token="<|im_end|>")
    long = [t for t in texts if len(t) > 1000][:10]
    for a, b in zip(tokenizer.encode_batch(long), smollm2.encode_batch(long), strict=True):
        assert np.array_equal(a.ids, b.ids)


def test_added_tokens_beyond_the_model_count_for_the_vocabulary(smollm2_json, tmp_path):
    raw = copy.deepcopy(smollm2_json)
    raw["added_tokens"].append({"id": 50_000, "content": "<extra>", "special": False} | dict.fromkeys(FLAGS, False))
    tokenizer = open_json(raw, tmp_path, eos_token="<extra>")
    assert (tokenizer.vocab_size, tokenizer.eos_id, len(tokenizer.byte_lengths)) == (50_001, 50_000, 50_001)
    (tokens,) = tokenizer.encode_batch(["an <extra> token"])
    assert 50_000 not in tokens.ids and tokens.n_bytes == 16


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<eos>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<eos>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<eos>"}),
        ("generation_config.json", {"eos_token_id": [256, 5]}),
        ("config.json", {"eos_token_id": 256}),
    ],
)
def test_eos_is_found_beside_the_tokenizer(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = open_json(small_bpe(), tmp_path)
    assert (tokenizer.eos_id, tokenizer.eos_token) == (256, "<eos>")


def chat(tmp_path, eos, control, template=None, ordinary=()):
    raw = small_bpe()
    names = [(name, True) for name in control] + [(name, False) for name in ordinary]
    flags = dict.fromkeys(FLAGS, False)
    raw["added_tokens"] = [{"id": 256 + i, "content": c, "special": s, **flags} for i, (c, s) in enumerate(names)]
    config = {"eos_token": eos} | ({"chat_template": template} if isinstance(template, list) else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if isinstance(template, str):
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return tmp_path


TEMPLATE = "{{ '<|turn|>' + message.content + '</s>' }}"


@pytest.mark.parametrize(
    ("eos", "control", "template", "ends"),
    [
        ("<|im_end|>", ["<|im_end|>", "<|endoftext|>"], None, "<|endoftext|>"),  # Qwen, SmolLM2, Yi
        ("<|eot_id|>", ["<|eot_id|>", "<|end_of_text|>"], None, "<|end_of_text|>"),  # Llama 3
        ("<|im_end|>", ["<s>", "</s>", "<|im_end|>"], None, "</s>"),  # Mistral with ChatML
        ("<|turn|>", ["<|turn|>", "<eos>"], TEMPLATE, "<eos>"),
        ("<|turn|>", ["<|turn|>", "<eos>"], [{"name": "default", "template": TEMPLATE}], "<eos>"),
        ("<|turn|>", ["<|turn|>", "<eos>"], None, "<|turn|>"),  # nothing says that it ends a turn
        ("</s>", ["</s>", "<|endoftext|>"], TEMPLATE, "</s>"),  # a separator, though its template has it
        ("<|im_end|>", ["<|im_end|>"], TEMPLATE, "<|im_end|>"),  # there is no other
    ],
)
def test_documents_end_with_the_separator_of_pretraining(eos, control, template, ends, tmp_path):
    tokenizer = open_tokenizer(chat(tmp_path, eos, control, template))
    assert tokenizer.eos_token == ends
    assert bool(tokenizer.eos_why) == (ends != eos) and (eos in tokenizer.eos_why or ends == eos)
    named = open_tokenizer(tmp_path, eos_token=eos)
    assert (named.eos_token, named.eos_why) == (eos, "")
    tokenizer.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").eos_token == ends


def test_a_separator_that_is_ordinary_vocabulary_ends_no_document(tmp_path):
    assert open_tokenizer(chat(tmp_path, "<|im_end|>", ["<|im_end|>"], None, ["<|endoftext|>"])).eos_token == "<|im_end|>"


def test_no_eos_names_the_option(tmp_path):
    with pytest.raises(TokenizerError, match="--student-eos or --teacher-eos"):
        open_json(small_bpe(), tmp_path)
    with pytest.raises(TokenizerError, match="'<end>' is not among its 257 tokens"):
        open_json(small_bpe(), tmp_path, eos_token="<end>")


def test_prefix_spaces_of_byte_level_and_metaspace(tmp_path, mistral):
    raw = small_bpe(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True})
    tokenizer = open_json(raw, tmp_path, eos_token="<eos>")
    for text in ("ab", " ab", "é", " "):
        (tokens,) = tokenizer.encode_batch([text])
        assert tokens.n_bytes == len(text.encode()) and tokens.ends_from == "table", text
    spaced = json.loads(mistral.source)
    spaced["normalizer"] = None
    for scheme, lengths in (("always", [0, 1, 2]), ("first", [0, 1, 2]), ("never", [1, 2])):
        spaced["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        tokenizer = open_json(spaced, tmp_path, eos_token="</s>")
        for text in ("中b", " ab", "x", "\n"):
            (tokens,) = tokenizer.encode_batch([text])
            assert tokens.n_bytes == len(text.encode()) and tokens.ends_from == "table", (scheme, text)
        (tokens,) = tokenizer.encode_batch(["\n\n"])
        assert tokens.ends.tolist() == lengths, scheme


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}}, "Replace"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "removes parts"),
        ({"pre_tokenizer": None}, "neither byte-level nor with byte fallback"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}}, "subword"),
    ],
)
def test_tokenizers_that_lose_bytes_are_refused_with_the_reason(change, reason, tmp_path):
    with pytest.raises(TokenizerError, match=reason) as error:
        open_json(small_bpe(**change), tmp_path, eos_token="<eos>")
    assert str(tmp_path) in str(error.value)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "tekken.json").write_text('{"config": {}, "vocab": []}')
    with pytest.raises(TokenizerError, match="no 'model'"):
        open_tokenizer(tmp_path / "tekken.json")
    (tmp_path / "noise.model").write_bytes(b"\xff\xfe\x00 noise")
    with pytest.raises(TokenizerError, match=r"noise\.model.*SentencePiece"):
        open_tokenizer(tmp_path / "noise.model")
    with pytest.raises(TokenizerError, match=r"no such file or folder$"):
        open_tokenizer(tmp_path / "missing")
    with pytest.raises(
        TokenizerError, match=r"no such file or folder\. The name counts as a path, because a Hub id has the form org/name"
    ):
        open_tokenizer("missing")
    with pytest.raises(TokenizerError, match=r"without tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="'rust'"):
        open_tokenizer(mistral_tokenizer_path(), backend="rust")


@pytest.mark.parametrize("change", ["unigram", "no byte fallback", "whitespace"])
def test_sentencepiece_models_that_lose_bytes_are_refused(change, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(mistral_tokenizer_path().read_bytes())
    if change == "unigram":
        proto.trainer_spec.model_type = 1
    elif change == "no byte fallback":
        proto.trainer_spec.byte_fallback = False
    else:
        proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "x.model").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"x\.model"):
        open_tokenizer(tmp_path / "x.model")


def test_a_folder_may_hold_a_sentencepiece_model(tmp_path, mistral):
    shutil.copy(mistral_tokenizer_path(), tmp_path / "tokenizer.model")
    assert open_tokenizer(tmp_path).fingerprint == mistral.fingerprint


def test_a_hub_id_is_read_from_the_local_cache(tmp_path, smollm2, smollm2_folder, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--smol" / "snapshots" / "0123"
    shutil.copytree(smollm2_folder, snapshot)
    (tmp_path / "models--someone--smol" / "refs").mkdir()
    (tmp_path / "models--someone--smol" / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_tokenizer("someone/smol").fingerprint == smollm2.fingerprint
    with pytest.raises(TokenizerError, match="not found on the Hub"):
        open_tokenizer("someone/other")


def test_offsets_place_what_the_table_cannot(tmp_path):
    """NFC of a text that is not: the table counts the composed bytes, the offsets the text's own."""
    tokenizer = open_json(small_bpe(normalizer={"type": "NFC"}), tmp_path, eos_token="<eos>")
    (tokens,) = tokenizer.encode_batch(["cafe\u0301 x"])
    # the composed é is two tokens over three bytes: how they divide them is not known
    assert tokens.ends_from == "unknown"
    assert isinstance(tokens, Tokens)


def test_offsets_must_tile():
    lengths = np.array([1, 1, 1], np.int32)
    good = ends_from_offsets("aéb", [(0, 1), (1, 2), (2, 3)], np.array([1, 2, 1], np.int32), 0)
    assert good is not None and good.tolist() == [1, 3, 4]
    cut = ends_from_offsets("aé", [(0, 1), (1, 2), (1, 2)], lengths, 0)
    assert cut is not None and cut.tolist() == [1, 2, 3]
    alone = ends_from_offsets("éb", [(0, 1), (0, 1), (1, 2)], np.array([1, 2, 1], np.int32), 1)
    assert alone is not None and alone.tolist() == [0, 2, 3]
    for offsets in ([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 1), (1, 2)], [(0, 1), (1, 1), (1, 3)], []):
        assert ends_from_offsets("abc", offsets, lengths[: len(offsets)], 0) is None, offsets
    assert ends_from_offsets("中", [(0, 1), (0, 1)], lengths[:2], 0) is None
