"""The corpus and dataset of tests/corpus, with small tokenizers: to open real ones takes longer than most of these builds."""

from __future__ import annotations

import pytest

from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import built, corpus, mistral, smollm2, smollm2_folder, texts
from tests.corpus.conftest import settings as real_settings

__all__ = ["built", "corpus", "mistral", "real_settings", "smollm2", "smollm2_folder", "texts"]


@pytest.fixture(scope="session")
def settings(tmp_path_factory, texts) -> BuildConfig:
    """Byte-level tokenizers of 500 and 900 tokens."""
    folders = [real.byte_level_bpe(tmp_path_factory.mktemp("tokenizer"), texts[:30], size) for size in (500, 900)]
    return BuildConfig(*map(str, folders))


@pytest.fixture(scope="session")
def student(settings) -> Tokenizer:
    return open_tokenizer(settings.student)
