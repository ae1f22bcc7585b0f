"""Models by Hub id: from a cache made by hand, and from a server that speaks the Hub's few endpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno import hub
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.model.folder import ModelError, model_folder, pinned
from megatron_vocagno.offline.score import Asked
from tests.hub_server import COMMIT, GATED, serving
from tests.runs import REPOSITORY, Case, environment, spawn

FETCH = "import sys; from megatron_vocagno import hub; print(hub.snapshot(sys.argv[1]))"


def python(program: str, name: str, **variables: str) -> subprocess.Popen[str]:
    """The Hub's library reads its settings when it is imported: each case is a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, name],
        cwd=REPOSITORY,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Its last line on standard output, and on standard error."""
    out, err = process.communicate(timeout=120)
    return out.strip().splitlines()[-1] if out.strip() else "", err.strip().splitlines()[-1] if err.strip() else ""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with all that a download should take, and more that it should not."""
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "README.md"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    for name in ("original/model.safetensors", "consolidated.safetensors"):
        (folder / name).write_text("a copy")
    return folder


def test_a_path_that_exists_is_no_id_and_a_slip_in_one_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    ids = ["Qwen/Qwen2.5-Math-7B", "a/b@main", "a/b@refs/pr/2", f"a/b@{COMMIT}", "a_1/b.c-d"]
    paths = [
        "models/tiny",
        "models/tyni",
        "models/tiny@main",
        "/a/b",
        "./a/b",
        "../a/b",
        "~/a/b",
        "a",
        "a/b/c",
        "a/b.gguf",
        "a/b@",
    ]
    assert [hub.is_id(name) for name in ids] == [True] * len(ids)
    assert [hub.is_id(name) for name in paths] == [False] * len(paths)
    assert [hub.short_name(Path(name)) for name in (ids[0], ids[2], "/x/tiny@1")] == ["Qwen2.5-Math-7B", "b", "tiny@1"]


def test_a_cache_made_by_hand_is_read_without_a_network(tmp_path: Path, model: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    names = ["someone/tiny", "someone/tiny@main", f"someone/tiny@{COMMIT}", "someone/tiny@v2", "someone/other"]
    found = [outcome(process) for process in [python(FETCH, name, **home) for name in names]]
    assert [out for out, _ in found] == [str(repository / "snapshots" / COMMIT)] * 3 + [""] * 2
    for name, (_, error) in zip(names[3:], found[3:], strict=True):
        assert f"HubError: {name} is not, or not whole, in the Hub's cache" in error
        assert "hf download someone/" in error and str(tmp_path / "home") in error


def test_of_many_processes_each_file_is_downloaded_once_and_nothing_that_could_run(tmp_path: Path, model: Path) -> None:
    with serving({"someone/tiny": model}) as server:
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        [folder] = {outcome(process)[0] for process in [python(FETCH, "someone/tiny", **where) for _ in range(3)]}
    assert Path(folder).name == COMMIT
    wanted = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in Path(folder).rglob("*")} == wanted
    downloads = {name: count for name, count in server.asked.items() if name.startswith("GET") and "resolve" in name}
    assert downloads == {f"GET someone/tiny resolve {COMMIT} {name}": 1 for name in wanted}
    # once it is there the Hub is not needed: this one has gone
    name = f"someone/tiny@{COMMIT}"
    assert outcome(python(FETCH, name, **where))[0] == folder


def test_what_the_hub_refuses_is_told(tmp_path: Path, model: Path) -> None:
    with serving({"someone/tiny": model}) as server:
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        messages = {
            "someone/nothing": "the Hub has no someone/nothing, or hides it",
            GATED: "someone/gated is gated: accept its terms on the Hub, and set HF_TOKEN",
            "someone/tiny@v2": "someone/tiny has no revision 'v2' on the Hub",
        }
        processes = [python(FETCH, name, **where) for name in messages]
        for process, message in zip(processes, messages.values(), strict=True):
            assert f"HubError: {message}" in outcome(process)[1]


def test_a_model_that_the_hub_does_not_give_is_an_error_with_both_readings_of_its_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot", lambda name: model)
    assert model_folder("someone/tiny") == model
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in someone/tiny: .* Pickled weights are not downloaded"):
        model_folder("someone/tiny")

    def refuse(*_: object) -> Path:
        raise hub.HubError("the reason")

    monkeypatch.setattr(hub, "snapshot", refuse)
    for reading in (model_folder, pinned):
        with pytest.raises(ModelError, match="no model at a/b: the path does not exist, and as a Hub id: the reason"):
            reading(Path("a/b"))


def test_losses_that_were_scored_by_id_are_those_of_the_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a dataset would have to be scored anew when its teacher is moved to the Hub's cache."""
    monkeypatch.setattr(hub, "snapshot", lambda name: case.teacher)
    data = AlignedDataset.open(case.train)
    by_id = Asked(Path(f"someone/{case.teacher.name}@{COMMIT}")).scoring(data)
    assert by_id == Asked(case.teacher).scoring(data) and by_id.name == case.teacher.name


def test_a_run_does_not_depend_on_the_road_by_which_its_models_came(case: Case, tmp_path: Path) -> None:
    """Models by path, and half of the steps again with models by id."""
    student = tmp_path / "student"
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.student, vocab_size=32_000)).save_pretrained(student)
    paths = [f"student.pretrained={student}", "training.steps=4", "training.schedule.kind=constant"]
    whole = case.run("by-path", 1, paths)
    half = case.run("by-id", 1, [*paths, "training.steps=2"])
    with serving({"someone/student": student, "someone/teacher": case.teacher}) as server:
        ids = ["student.pretrained=someone/student", "teacher.path=someone/teacher", *paths[1:]]
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        command = case.command("by-id", ids)
        finished = _with(where, command)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "resuming after step 2" in finished.stdout
    assert f"student.pretrained = someone/student@{COMMIT} (was {student})" in finished.stdout
    one, other = (load(output / "checkpoints" / "step-00000004") for output in (whole, half))
    assert one.keys() == other.keys() and len(one) > 5
    assert all(torch.equal(one[name], other[name]) for name in one)


def _with(variables: dict[str, str], command: list[str]) -> subprocess.CompletedProcess[str]:
    """A run in a process that sees these variables before it imports anything."""
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        return spawn(1, command, ("-m", "megatron_vocagno.pretrain"))
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {name}": t for file in checkpoint.rglob("*.safetensors") for name, t in load_file(file).items()}
