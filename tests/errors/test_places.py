"""Where a missing path was looked for, what may have been meant, and which command works where one stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from megatron_vocagno import hub
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.engine.settings import read_settings
from megatron_vocagno.errors import UserError, missing_path_hint, nearest, tool
from megatron_vocagno.model.folder import model_folder
from megatron_vocagno.model.gguf import dequantize
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.planning.model_config import given_config, read_config
from megatron_vocagno.preprocess.inputs import find
from megatron_vocagno.run_file import load_run
from tests.errors.telling import told
from tests.runs import REPOSITORY

PLACE = "The absolute path is DIR/NAME: relative paths start at the folder in which you run the command."


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "gemma-3-270m").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


READERS: dict[str, Callable[[str], object]] = {
    "a model": model_folder,
    "a teacher": teacher_folder,
    "a GGUF file": lambda path: dequantize(path, "out"),
    "a configuration": lambda path: read_config(Path(path), "teacher"),
    "a configuration of an option": lambda path: given_config(Path(path), "--teacher-config"),
    "a dataset": lambda path: read_manifest(Path(path)),
    "an input": lambda path: find([path]),
    "a run file": lambda path: load_run(Path(path)),
    "a DeepSpeed configuration": lambda path: read_settings(Path(path), 0, "cpu"),
}


@pytest.mark.parametrize("what", READERS)
def test_a_relative_path_that_is_not_there_is_told_in_full_with_a_near_name(what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        READERS[what]("../models/gema-3-270m")
    said = str(refusal.value)
    assert "../models/gema-3-270m" in said and "\n  Did you mean ../models/gemma-3-270m?" in said
    assert f"\n  The absolute path is {tmp_path}/models/gema-3-270m: relative paths start at the folder" in said
    with pytest.raises(UserError) as refusal:
        READERS[what](str(tmp_path / "nothing"))
    assert "The absolute path is" not in str(refusal.value) and "Did you mean" not in str(refusal.value)


def test_a_name_is_near_where_it_differs_by_a_slip_and_leads_to_something(tmp_path: Path) -> None:
    (tmp_path / "data" / "shards").mkdir(parents=True)
    for asked, meant in (("dta/shards", "data/shards"), ("dta/shrads", ""), ("other", ""), ("..", ""), ("a" * 300, "")):
        assert nearest(tmp_path / asked) == (f"\n  Did you mean {tmp_path / meant}?" if meant else ""), asked
    (tmp_path / "a.toml").touch()
    (tmp_path / "date").touch()
    assert nearest(tmp_path / "data") == missing_path_hint(tmp_path / "data") == "", "it exists"
    assert nearest(tmp_path / "x.toml") == ""


def test_a_slip_in_the_first_folder_is_no_organization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert hub.is_id("modls/gemma-3-270m")
    with pytest.raises(UserError, match=r"and as a Hub id: [\s\S]*\n  Did you mean models/gemma-3-270m\?$"):
        model_folder("modls/gemma-3-270m")


def test_a_base_counts_from_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('base = "models/comon.toml"')
    (tmp_path / "models" / "common.toml").touch()
    with told(
        snapshot(
            """\
no run file at ../models/comon.toml (base of ../run.toml, relative to its folder): No such file or directory
  Did you mean ../models/common.toml?\
"""
        )
    ):
        load_run(Path("../run.toml"))


def test_a_file_in_another_format_names_the_command_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "work" / "tiny.gguf").write_bytes(b"GGUF")
    with told(
        snapshot(
            """\
no model at tiny.gguf: tiny.gguf is a GGUF file, and only a teacher can be one. Convert the file, and use the folder:
  vocagno-convert tiny.gguf --out tiny\
"""
        )
    ):
        model_folder("tiny.gguf")
    assert missing_path_hint("tiny") == "\n  " + PLACE.replace("DIR", str(tmp_path)).replace("NAME", "work/tiny")


def test_a_tool_is_named_as_it_works_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that is named is started: with the package installed and without, here and elsewhere."""
    site = tmp_path / "site"  # as pip lays it out
    shutil.copytree(REPOSITORY / "megatron_vocagno", site / "megatron_vocagno")
    shutil.copytree(REPOSITORY / "tools", site / "megatron_vocagno" / "tools")
    met = set()
    for folder, path in ((REPOSITORY, ""), (REPOSITORY, str(site)), (tmp_path, str(site)), (tmp_path, str(REPOSITORY))):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONPATH", path)
        command = tool("preprocess.show_document")
        met.add(command)
        words = [sys.executable, *command.split()[1:], "--help"]
        if not command.startswith("python"):  # what pip writes into a script
            start = "from megatron_vocagno.tools.preprocess.show_document import main; main()"
            words = [sys.executable, "-c", f"import sys; sys.argv[0] = {command!r}; {start}", "--help"]
        finished = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.startswith(f"usage: {command} "), (folder, path)
    assert len(met) == 2
