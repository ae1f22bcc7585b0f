"""A GGUF file is a teacher to every command, or the command says what makes one of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vocagno.config import Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.placement import check_teacher
from megatron_vocagno.errors import DatasetError
from megatron_vocagno.model.gguf import cached_folder
from megatron_vocagno.planning.dry_run import _compare
from tests.corpus.conftest import write_jsonl
from tests.model.test_gguf import VOCAB, write_gguf
from tests.runs import REPOSITORY
from tests.tokenizers_for_tests import mistral_tokenizer_path
from tools.convert import gguf_to_safetensors
from tools.preprocess import build_dataset, score_teacher
from tools.preprocess.console import absolute


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRON_VOCAGNO_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf")


def test_a_dataset_for_a_gguf_teacher_is_built_scored_and_its_own(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["the hats, 12 of them."] * 4)
    student = str(mistral_tokenizer_path())
    for teacher, out in ((gguf, "one"), (cached_folder(gguf), "other")):
        words = [str(corpus), "--student", student, "--teacher", str(teacher), "--out", str(tmp_path / out), "--workers", "1"]
        assert build_dataset.main(words) == 0
    one, other = (AlignedDataset.open(tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint and one.teacher_tokenizer.vocab_size == len(VOCAB)
    assert one.totals.teacher_tokens > 40
    assert score_teacher.main([str(one.path), "--teacher", str(gguf), "--dtype", "float32"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_an_error_about_a_gguf_teacher_names_its_file(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not the folder in the cache."""
    corpus, student = write_jsonl(tmp_path / "corpus.jsonl", ["the hats, 12 of them."] * 4), str(mistral_tokenizer_path())
    other = tmp_path / "other"
    options = [str(corpus), "--out", str(other), "--workers", "1", "--student", student, "--teacher"]
    assert build_dataset.main([*options, student]) == 0
    capsys.readouterr()
    assert score_teacher.main([str(other), "--teacher", str(gguf), "--dtype", "float32"]) == 2
    told = capsys.readouterr().err
    assert str(gguf) in told and str(cached_folder(gguf)) not in told
    # a model of 38 tokens is refused before its tokenizer is compared
    data = AlignedDataset.open(other)
    for refuse in (
        lambda: check_teacher(Teacher(path=gguf), data),
        lambda: _compare(data, "teacher.path", gguf),
    ):
        with pytest.raises(DatasetError, match=rf"another tokenizer than that of the teacher model, {gguf}[., ]") as refused:
            refuse()
        assert str(cached_folder(gguf)) not in str(refused.value)
    (cached_folder(gguf) / "tokenizer.json").write_text("{")
    assert build_dataset.main([*options, str(gguf)]) == 2
    told = capsys.readouterr().err
    assert f"{gguf} (tokenizer.json of its conversion)" in told and str(cached_folder(gguf)) not in told


@pytest.mark.slow
@pytest.mark.parametrize("command", ["preprocess.build_dataset", "preprocess.score_teacher", "convert.gguf_to_safetensors"])
def test_a_gguf_file_needs_both_extras_and_says_so_first(command: str, gguf: Path, tmp_path: Path) -> None:
    """In an installation without extras."""
    corpus, student = write_jsonl(tmp_path / "corpus.jsonl", ["the hats"]), str(mistral_tokenizer_path())
    words = {
        "preprocess.build_dataset": [str(corpus), "--student", student, "--teacher", str(gguf), f"--out={tmp_path / 'out'}"],
        "preprocess.score_teacher": [str(tmp_path / "data"), "--teacher", str(gguf)],
        "convert.gguf_to_safetensors": [str(gguf), "--out", str(tmp_path / "out")],
    }[command]
    program = f"import sys; sys.modules['torch'] = None; from tools.{command} import main; sys.exit(main())"
    finished = subprocess.run([sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True)
    told = "error: this command needs torch: pip install 'megatron-vocagno[train,gguf]'\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", told)


def test_a_conversion_that_cannot_be_is_refused_before_its_time_is_estimated(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gguf_to_safetensors.main([str(gguf), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"error: cannot write {tmp_path}: it exists. Remove it, or write to another folder\n")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf_to_safetensors.main([str(gguf), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.endswith("reading it needs gguf: pip install 'megatron-vocagno[gguf]'\n")


def test_a_conversion_reports_the_step_after_the_weights(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gguf_to_safetensors.main([str(gguf), "--out", str(tmp_path / "told")]) == 0
    told = capfd.readouterr().out
    assert "for its weights, and 10 s per 50,000 tokens of its vocabulary\n" in told
    assert "the weights are converted; converting the tokenizer" in told


def test_a_path_is_normalized_and_a_link_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "blob").touch()
    (tmp_path / "store" / "text.txt").symlink_to(tmp_path / "store" / "blob")
    monkeypatch.chdir(tmp_path / "repo")
    for asked, meant in (
        ("../store/new", "store/new"),
        ("../data", "data"),
        ("../store/text.txt", "store/text.txt"),
        ("..", "."),
    ):
        assert absolute(Path(asked)) == tmp_path / meant
    assert absolute(Path("x/y")) == tmp_path / "repo" / "x" / "y"
