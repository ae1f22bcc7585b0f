"""The corpus, tokenizers and dataset of tests/corpus: what is built here is read there."""

from tests.corpus.conftest import built, corpus, mistral, settings, smollm2, smollm2_folder, texts

__all__ = ["built", "corpus", "mistral", "settings", "smollm2", "smollm2_folder", "texts"]
