"""The corpus and dataset of tests/corpus, with small tokenizers: to open real ones takes longer than most of these builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.corpus.conftest import built, corpus, mistral, smollm2, smollm2_folder, texts
from tests.corpus.conftest import settings as real_settings

__all__ = ["built", "corpus", "mistral", "real_settings", "smollm2", "smollm2_folder", "texts"]


@pytest.fixture(scope="session")
def settings(tmp_path_factory, texts) -> BuildConfig:
    """Byte-level tokenizers of 500 and 900 tokens."""
    folders = [byte_level_bpe(tmp_path_factory.mktemp("tokenizer"), texts[:30], size) for size in (500, 900)]
    return BuildConfig(*map(str, folders))


@pytest.fixture(scope="session")
def student(settings) -> Tokenizer:
    return open_tokenizer(settings.student)


def byte_level_bpe(folder: Path, texts: list[str], size: int) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder
