"""The Slurm scripts, run as Slurm would run them, on two processes of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents
from tests.datasets import build_dataset
from tests.examples.launch import fake_slurm, player
from tests.examples.launch.conftest import RUN, documented, group, has_done, losses, wait_for
from tests.runs import REPOSITORY, Case, environment, free_port

SCRIPTS = REPOSITORY / "examples" / "launch" / "slurm"
TRAIN = str(SCRIPTS / "train.sbatch")
SHARD = 1200
"""Bytes of text in a shard."""
TWO_NODES = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"

Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Its folder: jobs and logs."""
    return tmp_path / "slurm"


@pytest.fixture
def submit(slurm: Path) -> Iterator[Submit]:
    fake_slurm.install(slurm)
    users = ExitStack()

    def run(script: str, **variables: str) -> subprocess.Popen[str]:
        """A user's commands; they have ended when their jobs have."""
        env = environment() | variables | {"FAKE_SLURM": str(slurm)}
        env["PATH"] = f"{slurm / 'bin'}{os.pathsep}{env['PATH']}"
        return users.enter_context(group(["bash", "-euc", script], cwd=REPOSITORY, env=env, stderr=subprocess.PIPE))

    with users:
        yield run


def ended(user: subprocess.Popen[str], slurm: Path) -> list[list[list[int]]]:
    """For each job and each task of it, the exit codes of its starts."""
    _, errors = user.communicate(timeout=300)
    assert user.returncode == 0, errors + log(slurm)
    return [fake_slurm.job(slurm, int(path.stem))["exit_codes"] for path in sorted(slurm.glob("*.json"))]


def log(slurm: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(slurm.glob("*.log")))


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sbatch")))
def test_slurm_would_understand_every_option(script: str) -> None:
    options = fake_slurm.script_options(SCRIPTS / script)
    assert {"job-name", "time", "requeue", "output", "open-mode", "cpus-per-task"} <= options.keys()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#SBATCH --gpu-per-node=8", "unrecognized option --gpu-per-node"),
        ("#SBATCH --time=a-day", "--time=a-day: not of the form"),
        ("#SBATCH --requeue=yes", "takes no value"),
        ("# SBATCH --requeue", "would pass over"),
        ("true\n#SBATCH --requeue", "would pass over"),
        ("#SBATCH --nodes=$N", "not of the form"),
    ],
)
def test_the_stub_refuses_what_slurm_would_not_understand(line: str, words: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\n{line}\n")
    with pytest.raises(SystemExit, match=words):
        fake_slurm.script_options(script)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    """A dataset of three shards."""
    texts = [text[:300] for text in real.texts()[:12]]
    folder = tmp_path_factory.mktemp("slurm") / "small"
    return build_dataset(folder, texts, real.mistral_tokenizer_path(), teacher_tokenizer, shard_bytes=SHARD).path


def test_an_array_makes_the_dataset_of_one_process(
    small: Path,
    teacher_tokenizer: Path,
    slurm: Path,
    submit: Submit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = slurm / "dataset"
    words = {
        "1-64": "1-2 --cpus-per-task=1",
        "CORPUS": f"{small.parent / 'corpus.jsonl'} --shard-mb {SHARD / 2**20}",
        "STUDENT": str(real.mistral_tokenizer_path()),
        "TEACHER": str(teacher_tokenizer),
        "DATA": str(out),
    }
    preprocess, _, _ = documented("Slurm", words)
    assert ended(submit(preprocess, **player.install(slurm)), slurm) == [[[0], [0]], [[0]]], log(slurm)
    player.run_recorded(slurm, monkeypatch)
    told = capsys.readouterr().out
    assert "part 1 of 2 is done" in told and "part 2 of 2 is done" in told
    assert len(list((out / "shards").iterdir())) > 2
    assert contents(out) == contents(small)


def test_an_array_scores_a_dataset(case: Case, small: Path, slurm: Path, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shutil.copytree(small, slurm.parent / "dataset")
    words = {"--array=1-16": "--array=1-2 --ntasks-per-node=2", "DATA": str(data), "TEACHER": f"{case.teacher} --dtype float32"}
    _, score, _ = documented("Slurm", words)
    assert ended(submit(score, **player.install(slurm)), slurm) == [[[0], [0]]], log(slurm)
    ran = sorted(([arguments[-2:], place] for _, arguments, place in player.recorded(slurm)), key=str)
    places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    assert ran == [[["--shards", part], place] for part in ("1/2", "2/2") for place in places]
    player.run_recorded(slurm, monkeypatch)
    losses = AlignedDataset.open(data).manifest.teacher_losses
    assert losses is not None and AlignedDataset.open(small).manifest.teacher_losses is None


def test_an_array_scores_with_a_server_in_each_task(case: Case, small: Path, slurm: Path, submit: Submit) -> None:
    data = shutil.copytree(small, slurm.parent / "dataset")
    script, port = SCRIPTS / "score_served.sbatch", free_port()
    words = f"--array=1-1 --gpus-per-node=1 --cpus-per-task=1 {script} {data} --teacher {case.teacher} --context=128"
    here = {"VLLM": f"{sys.executable} -m tests.serving.fake_server", "PORT": str(port)}
    assert ended(submit(f"sbatch {words}", **here), slurm) == [[[0]]], log(slurm)
    losses = AlignedDataset.open(data).manifest.teacher_losses
    assert losses is not None and losses.scoring.served is not None and losses.scoring.context == 128
    with socket.socket() as probe:  # the server has ended
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [("--teacher /nowhere", 1, "vLLM ended before it could answer"), ("", 2, "--teacher is missing")],
)
def test_a_server_that_cannot_start_ends_the_task(options: str, code: int, words: str, slurm: Path, submit: Submit) -> None:
    here = {"VLLM": f"{sys.executable} -m tests.serving.fake_server", "PORT": str(free_port())}
    script = f"sbatch --gpus-per-node=1 --cpus-per-task=1 {SCRIPTS / 'score_served.sbatch'} DATA {options}"
    assert ended(submit(script, **here), slurm) == [[[code]]]
    assert words in log(slurm)


@pytest.mark.parametrize("script", ["preprocess", "score", "score_served"])
def test_an_array_that_does_not_start_at_one_is_refused(script: str, slurm: Path, submit: Submit) -> None:
    assert ended(submit(f"sbatch --array=3 {SCRIPTS / script}.sbatch x"), slurm) == [[[2]]]
    assert "the array must be 1-N" in log(slurm)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_its_end(case: Case, one_host: dict[int, float], slurm: Path, submit: Submit) -> None:
    """USR1 before the time limit: saved, put back into the queue, started again; as if nothing had been."""
    run, _, settings, *overrides = case.command("slurm", RUN)
    words = {"--nodes=4": TWO_NODES, "RUN.toml": run, "ds_configs/gpu_zero1_bf16.json": " ".join([settings, *overrides])}
    _, _, train = documented("Slurm", words)
    user, output = submit(train), case.out("slurm")
    wait_for(lambda: has_done(output, 3))
    assert fake_slurm.signal_job(slurm, "USR1", batch_shell=False) == 2
    assert ended(user, slurm) == [[[0, 0]]], log(slurm)
    assert "back to the queue" in log(slurm) and "resuming after step" in log(slurm)
    assert losses(output) == one_host


def test_tasks_know_their_places(slurm: Path, submit: Submit, tmp_path: Path) -> None:
    user = submit(f"sbatch --nodes=2 --ntasks-per-node=2 {TRAIN} RUN.toml", **player.install(tmp_path, ["finish"]))
    assert ended(user, slurm) == [[[0]]]
    (job,) = (int(path.stem) for path in slurm.glob("*.json"))
    for rank in range(4):
        assert (tmp_path / f"rank-{rank}").read_text() == f"{rank} {rank % 2} 4 2 127.0.0.1 {20_000 + job % 10_000}"


@pytest.mark.parametrize(
    ("starts", "codes"),
    [
        ([["17", "0"]], [17]),  # nothing new was saved, so another start would most likely end the same way
        ([["save+17", "0"], ["17", "17"]], [0, 17]),
        ([["save+die", "0"], ["finish", "0"]], [0, 0]),
        ([["save+2", "2"]], [2]),
        ([["save+130", "130"]], [130]),
    ],
)
def test_a_run_that_failed_starts_again_only_where_it_went_on(
    starts: list[list[str]], codes: list[int], slurm: Path, submit: Submit, tmp_path: Path
) -> None:
    user = submit(f"sbatch {TWO_NODES} {TRAIN} RUN.toml", **player.install(tmp_path, *starts))
    assert ended(user, slurm) == [[codes]], log(slurm)


@pytest.mark.parametrize(("command", "codes"), [("scancel", [0]), ("scancel --signal=USR1", [0, 0])])
def test_a_cancelled_run_stays_away_and_a_signalled_one_comes_back(
    command: str, codes: list[int], slurm: Path, submit: Submit, tmp_path: Path
) -> None:
    user = submit(f"sbatch {TWO_NODES} {TRAIN} RUN.toml", **player.install(tmp_path, ["save+wait"] * 2, ["finish"] * 2))
    wait_for(lambda: len(list(tmp_path.glob("rank-*"))) == 2 and (tmp_path / "checkpoints" / "latest").exists())
    name = "USR1" if "USR1" in command else "TERM"
    (job,) = (path.stem for path in slurm.glob("*.json"))
    assert submit(f"{command} {job}").wait() == 0
    assert ended(user, slurm) == [[codes]], log(slurm)
    assert sorted(path.name for path in tmp_path.glob("SIG*")) == [f"SIG{name}-0", f"SIG{name}-1"]
