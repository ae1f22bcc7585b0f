from __future__ import annotations

import json
import unicodedata
from pydoc_data.topics import topics

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tools.preprocess.interlinear import Interlinear

HOSTILE = [
    "<script>alert('x')</script><img src=http://example.com/x onerror=alert(1)> &amp; <b>\"quoted\"</b></body></html>",
    "{{ totals }} {% raw %} [red]markup[/red] \x1b[31mescape\x1b[0m \x9b31m \u202eright to left\u202c",
    "⟦The⟧ ⟪signs⟫ ⟨c3⟩ ⟨U+0041⟩ ␣ ␊ ◌ themselves",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Hostile and awkward ones, twenty languages, a long manual page; as they stand in a dataset."""
    chosen = (
        HOSTILE
        + real.awkward_texts()
        + real.multilingual_texts()
        + [min((t for t in topics.values() if len(t) > 20_000), key=len)]
    )
    return [unicodedata.normalize("NFC", text) for text in chosen]


@pytest.fixture(scope="session")
def small(tmp_path_factory, teacher_tokenizer, texts) -> Interlinear:
    """Student Mistral, whose dummy prefix is always there; teacher SmolLM2."""
    folder = tmp_path_factory.mktemp("small") / "data"
    return Interlinear(build_dataset(folder, texts, real.mistral_tokenizer_path(), teacher_tokenizer))


@pytest.fixture(scope="session", params=["mistral-smollm2", "smollm2-mistral", "mistral-mistral"])
def opened(request, tmp_path_factory, teacher_tokenizer, texts, small) -> Interlinear:
    """The same texts with a dummy prefix on the student's side, on the teacher's, on both."""
    if request.param == "mistral-smollm2":
        return small
    paths = {"mistral": real.mistral_tokenizer_path(), "smollm2": teacher_tokenizer}
    student, teacher = (paths[name] for name in request.param.split("-"))
    return Interlinear(build_dataset(tmp_path_factory.mktemp(request.param) / "data", texts, student, teacher))


@pytest.fixture(scope="session")
def with_ids(tmp_path_factory, teacher_tokenizer) -> AlignedDataset:
    """Three documents with hostile ids, and four bad lines, one of which names its key hostilely."""
    folder = tmp_path_factory.mktemp("with_ids")
    rows = [{"id": id_, "text": f"the text of {id_}"} for id_ in ("plain", "<i onclick=x>&amp;", "\x1b[31m[red]")]
    bad = ["not json", '{"id": "a", "text": 3}', '{"id": "b", "text": 3}', '{"<b>&": "c"}']
    (folder / "corpus.jsonl").write_text("\n".join([*map(json.dumps, rows), *bad]))
    settings = BuildConfig(
        student=str(real.mistral_tokenizer_path()), teacher=str(teacher_tokenizer), on_bad_line="quarantine", id_key="id"
    )
    build([folder / "corpus.jsonl"], folder / "dataset", settings)
    return AlignedDataset.open(folder / "dataset")
