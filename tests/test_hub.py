"""Models by Hub id: from a cache made by hand, and from a server that speaks the Hub's few endpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno import hub
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import Manifest, read_manifest
from megatron_vocagno.errors import HubError, ModelError, RunError, UserError
from megatron_vocagno.model.folder import cached_snapshot, model_folder, pinned
from megatron_vocagno.planning.model_config import read_config
from megatron_vocagno.preprocess.score import ScoringOptions
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.loop import with_fields
from tests.hub_server import COMMIT, GATED, serving
from tests.runs import REPOSITORY, Case, environment, spawn
from tools.preprocess import score_teacher

FETCH = """
import sys
from megatron_vocagno import hub
for name in sys.argv[1:]:
    try:
        print(hub.snapshot(name))
    except hub.HubError as error:
        print("HubError:", *str(error).splitlines())
"""


def python(program: str, *names: str, **variables: str) -> subprocess.Popen[str]:
    """The Hub's library reads its settings when it is imported: each group of settings is a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *names],
        cwd=REPOSITORY,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with all that a download should take, and more that it should not."""
    folder = tmp_path / "model"
    (folder / "original").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "pytorch_model.bin",
        "modeling.py",
        "README.md",
        "chat_template.jinja",
    ):
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
    names = [ids[0], ids[2], "/x/tiny@1", "models/other@main"]
    assert [hub.short_name(Path(name)) for name in names] == ["Qwen2.5-Math-7B", "b", "tiny@1", "other"]


def test_a_folder_named_like_an_organization_is_reported_and_hides_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    assert hub.is_id(f"Qwen/small@{COMMIT}") and not hub.is_id("Qwen/small")
    with pytest.raises(ModelError, match=r"no model at Qwen/small: .* counts as a path, .* because `Qwen` exists"):
        model_folder("Qwen/small")
    with pytest.raises(RunError, match="not as a Hub id, because `Qwen` exists"):
        read_config(Path("Qwen/small"), "teacher")
    with pytest.raises(ModelError, match=r"because a Hub id has the form org/name or org/name@revision\."):
        model_folder("./Qwen/small")


def test_what_the_system_refuses_to_look_at_is_a_path_with_an_error_of_its_own(tmp_path: Path) -> None:
    name = Path("a" * 300) / "b"
    assert not hub.is_id(name) and pinned([name], tmp_path / "pins.json") == [name]
    with pytest.raises(ModelError, match=r"no model at aaa.*File name too long"):
        model_folder(name)
    with pytest.raises(RunError, match=r"no configuration of the teacher at aaa.*File name too long"):
        read_config(name, "teacher")


def test_a_pin_outlives_the_branch_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commits = {"Qwen/small": "1" * 40, "Qwen/large@v2": "2" * 40, "Qwen/small@v2": "3" * 40}
    asked: list[str] = []

    def snapshot(name: str, _: object) -> Path:
        asked.append(name)
        return Path(commits[name])

    monkeypatch.setattr(hub, "snapshot", snapshot)
    record = Path("Qwen/run1/pins.json")  # its folder hides the organization from the second start
    names, pins = list(map(Path, commits)), [Path(f"{name.partition('@')[0]}@{commit}") for name, commit in commits.items()]
    assert pinned([*names[:2], tmp_path], record) == [*pins[:2], tmp_path]
    commits.update(dict.fromkeys(list(commits)[:2], "4" * 40))
    assert pinned(names[:2], record) == pins[:2]
    # another revision is another wish
    record = (tmp_path / "Qwen").rename(tmp_path / "elsewhere") / "run1/pins.json"
    assert pinned(names[1:], record) == pins[1:] and asked == list(commits)
    assert json.loads(record.read_text()) == dict(zip(map(str, names), map(str, pins), strict=True))
    # what is here, and what has a commit, asks neither the record nor the Hub
    (tmp_path / "Qwen/small").mkdir(parents=True)
    record.write_text('{"Qwen/small": "Qwen/small"}')
    assert pinned([names[0], pins[0]], record) == [names[0], pins[0]]
    with pytest.raises(ModelError, match=r"pins.json, "):
        pinned(names[1:2], record)


def test_of_two_processes_that_pin_at_once_the_first_has_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, first = tmp_path / "pins.json", f"a/b@{'1' * 40}"

    def snapshot(*_: object) -> Path:
        record.write_text(json.dumps({"a/b": first}))
        return Path("2" * 40)

    monkeypatch.setattr(hub, "snapshot", snapshot)
    assert pinned([Path("a/b")], record) == [Path(first)]


def test_all_tasks_that_score_a_dataset_read_one_commit(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shutil.copytree(case.train, tmp_path / "data")
    asked: list[ScoringOptions] = []

    def keep(path: Path, what: ScoringOptions, *_: object) -> Manifest:
        asked.append(what)
        return read_manifest(path)

    monkeypatch.setattr("tools.preprocess.score_commands.score_dataset", keep)
    for task, commit in (("1/2", "1" * 40), ("2/2", "2" * 40)):
        monkeypatch.setattr(hub, "snapshot", lambda *_, commit=commit: Path(commit))
        assert score_teacher.main([str(data), "--teacher", "someone/tiny", "--shards", task]) == 0
    assert [what.teacher for what in asked] == [Path(f"someone/tiny@{'1' * 40}")] * 2
    assert score_teacher.main([str(tmp_path / "nowhere"), "--teacher", "someone/tiny"]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_cache_made_by_hand_is_read_without_a_network(tmp_path: Path, model: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    names = ["someone/tiny", "someone/tiny@main", f"someone/tiny@{COMMIT}", "someone/tiny@v2", "someone/other"]
    found = lines_of(python(FETCH, *names, **home))
    assert found[:3] == [str(repository / "snapshots" / COMMIT)] * 3
    for name, error in zip(names[3:], found[3:], strict=True):
        assert f"HubError: {name} is missing or incomplete in the Hub's cache" in error
        assert "and the Hub is not contacted, because HF_HUB_OFFLINE" in error and "local_files_only" not in error
        assert "hf download someone/" in error and str(tmp_path / "home") in error


def test_a_hub_that_does_not_answer_differs_from_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}  # no one listens there
    only_cache = FETCH.replace("(name)", "(name, offline=name.endswith('unasked'))")
    silent, unasked = lines_of(python(only_cache, "someone/silent", "someone/unasked", **nobody))
    assert "and the Hub does not answer (ConnectError: " in silent and "not asked" not in silent
    assert "and the Hub was not contacted. Download it" in unasked and "answer" not in unasked
    assert "local_files_only" not in silent + unasked

    def refuse(*_: object, **__: object) -> list[str]:
        raise ConnectionError("nobody is there\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    for offline, why in (
        (False, r"the Hub does not answer \(ConnectionError: nobody is there\)\."),
        (True, "HF_HUB_OFFLINE or "),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(HubError, match=why):
            hub.require_unlisted("someone/tiny", ["config.json"])


def test_an_incomplete_cache_is_reported_in_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = [tmp_path / f"home/hub/models--someone--{name}/snapshots/{COMMIT}" for name in ("shards", "config", "whole")]
    for folder in snapshots:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    for folder in (snapshots[0], snapshots[2]):
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (snapshots[2] / "model-1.safetensors").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("shards", "config"):
        with pytest.raises(ModelError) as told:
            model_folder(f"someone/{name}@{COMMIT}")
        assert f"someone/{name}@{COMMIT} is missing or incomplete in the Hub's cache" in str(told.value)
        assert f"hf download someone/{name}" in str(told.value) and cached_snapshot(f"someone/{name}@{COMMIT}") is None
    assert model_folder(f"someone/whole@{COMMIT}") == cached_snapshot(f"someone/whole@{COMMIT}") == snapshots[2]


def test_a_file_is_missing_on_the_hub_only_if_the_hub_does_not_list_it(tmp_path: Path, model: Path) -> None:
    program = FETCH.replace("hub.snapshot(name)", "hub.require_unlisted('someone/tiny', [name])")
    with serving({"someone/tiny": model}) as server:
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        absent, listed = lines_of(python(program, "absent.json", "model.safetensors", **where))
        assert absent == "None" and "although it does now" in listed
        assert "HubError: someone/tiny is missing or incomplete in the Hub's cache" in listed
        [offline] = lines_of(python(program, "absent.json", HF_HUB_OFFLINE="1", **where))
        assert "HubError: someone/tiny is missing or incomplete" in offline


def test_of_many_processes_each_file_is_downloaded_once_and_nothing_that_could_run(tmp_path: Path, model: Path) -> None:
    with serving({"someone/tiny": model}) as server:
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        [[folder]] = {tuple(lines_of(process)) for process in [python(FETCH, "someone/tiny", **where) for _ in range(3)]}
    assert Path(folder).name == COMMIT
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"}
    assert {path.name for path in Path(folder).rglob("*")} == wanted
    downloads = {name: count for name, count in server.asked.items() if name.startswith("GET") and "resolve" in name}
    assert downloads == {f"GET someone/tiny resolve {COMMIT} {name}": 1 for name in wanted}
    # once it is there the Hub is not needed: this one has gone
    name = f"someone/tiny@{COMMIT}"
    assert lines_of(python(FETCH, name, **where)) == [folder]


def test_a_refusal_of_the_hub_is_reported(tmp_path: Path, model: Path) -> None:
    with serving({"someone/tiny": model}) as server:
        where = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
        messages = {
            "someone/nothing": "the Hub has no someone/nothing, or it is private",
            GATED: "someone/gated is gated: accept its terms on the Hub, and set HF_TOKEN",
            "someone/tiny@v2": "someone/tiny has no revision 'v2' on the Hub",
        }
        for told, message in zip(lines_of(python(FETCH, *messages, **where)), messages.values(), strict=True):
            assert f"HubError: {message}" in told


def test_a_model_that_the_hub_does_not_give_is_an_error_with_both_readings_of_its_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot", lambda name: model)
    monkeypatch.setattr(hub, "require_unlisted", lambda *_: None)
    assert model_folder("someone/tiny") == model
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in someone/tiny: .* Pickled weights are not downloaded"):
        model_folder("someone/tiny")

    def refuse(*_: object) -> Path:
        raise HubError("the reason")

    monkeypatch.setattr(hub, "snapshot", refuse)
    with pytest.raises(ModelError, match="no model at a/b: the path does not exist, and as a Hub id: the reason"):
        model_folder("a/b")
    with pytest.raises(ModelError, match="no model at a/b: the path does not exist, and as a Hub id: the reason"):
        pinned([Path("a/b")], model / "pins.json")


def test_the_error_of_a_run_names_the_field_of_a_model_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Path:
        raise HubError("the reason")

    monkeypatch.setattr(hub, "snapshot", refuse)
    monkeypatch.chdir(REPOSITORY)
    met = 0
    for student, teacher, fields in (
        ("a/b", "a/c", {"a/b": "student.pretrained", "a/c": "teacher.path"}),
        ("a/b", "a/b", {"a/b": "student.pretrained and teacher.path"}),
        (f"a/b@{COMMIT}", "~/c", {f"a/b@{COMMIT}": "student.pretrained", "~/c": "teacher.path"}),
    ):
        run = load_run(Path("examples/quickstart.toml"), [f"student.pretrained={student}", f"teacher.path={teacher}"])
        for name, field in fields.items():
            for action in (lambda name: pinned([Path(name)], tmp_path / "pins.json"), model_folder):
                try:
                    action(name)
                except ModelError as error:
                    told = with_fields(run, error)
                    assert told == f"{field}: {error}" and "no model at" in told
                    met += 1
    assert met == 8  # a commit and a path need no pin
    assert with_fields(run, UserError("pins.json cannot be read")) == "pins.json cannot be read"


def test_losses_that_were_scored_by_id_are_those_of_the_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a dataset would have to be scored anew when its teacher is moved to the Hub's cache."""
    monkeypatch.setattr(hub, "snapshot", lambda name: case.teacher)
    data = AlignedDataset.open(case.train)
    by_id = ScoringOptions(Path(f"someone/{case.teacher.name}@{COMMIT}")).scoring(data)
    assert by_id == ScoringOptions(case.teacher).scoring(data) and by_id.name == case.teacher.name


@pytest.mark.long
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
    for side in ("student", "teacher"):
        cache = tmp_path / "home/hub" / f"models--someone--{side}/snapshots/{COMMIT}"
        assert f"from the Hub: someone/{side}@{COMMIT}, in {cache}\n" in finished.stdout
    pins = json.loads((half / "pins.json").read_text())
    assert pins == {f"someone/{side}": f"someone/{side}@{COMMIT}" for side in ("student", "teacher")}
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
        return spawn(1, command, ("-m", "megatron_vocagno.pretrain"), fresh=True)
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {name}": t for file in checkpoint.rglob("*.safetensors") for name, t in load_file(file).items()}
