"""Faults during a run: killed processes, requested stops, full disks, losses that are not finite. Uses real processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import soak
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.manifest import checkpoint_folders, finished_checkpoints, read_manifest
from tests import runs
from tests.runs import REPOSITORY, SMALL_VOCABULARY, Case, metrics, spawn, spawn_each

pytestmark = pytest.mark.slow

PP2 = "parallel.pipeline_stages=2"


def learned(output: Path) -> list[dict[str, float]]:
    return [line for line in metrics(output) if "loss/train" in line]


def wait_for_steps(output: Path, steps: int) -> int:
    """Until metrics.jsonl holds so many steps; how many it holds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = output / "metrics.jsonl"
        done = path.read_bytes().count(b'"loss/train"') if path.exists() else 0
        if done >= steps:
            return done
        time.sleep(0.01)
    raise AssertionError(f"{output} did not come to step {steps}")


@pytest.mark.long
def test_killed_at_random_under_the_supervisor_it_ends_where_an_undisturbed_run_ends(case: Case) -> None:
    overrides = [*soak.LAYOUT, "training.steps=6", "checkpoint.every=1", "eval.rows=4"]
    shared_memory = soak.shared_memory()
    kills, run = soak.kill_at_random(case, "killed-thrice", overrides, kills=3, seed=1)
    assert len(kills) == 3 and "save" in {kill.moment for kill in kills}, kills
    assert run.process.returncode == 0, run.log.read_text()[-4000:]
    assert (run.output / "finished").read_text() == "6\n"
    assert not soak.left_behind(run) and soak.shared_memory() <= shared_memory
    straight = case.run("never-killed", 2, overrides)
    assert not soak.differences(straight, run.output)
    assert [line["loss/train"] for line in learned(straight)] == [line["loss/train"] for line in learned(run.output)]


def test_a_signal_to_one_rank_makes_all_save_and_leave(case: Case) -> None:
    output, answer = case.out("signalled"), []
    arguments = case.command("signalled", [PP2, "training.steps=500", "training.schedule.kind=constant", "eval.rows=4"])
    for life, number in enumerate((signal.SIGUSR1, signal.SIGTERM)):
        before = len(learned(output)) if life else 0
        thread = threading.Thread(target=lambda: answer.append(spawn(2, arguments)))
        thread.start()
        done = wait_for_steps(output, before + 2)
        ranks = sorted(psutil.Process(runs.forks()[1]).children(), key=lambda process: process.pid)
        ranks[1 - life].send_signal(number)
        time.sleep(0.05)
        ranks[1 - life].send_signal(signal.SIGTERM)  # changes nothing
        thread.join()
        assert answer[-1].returncode == 0, answer[-1].stdout[-4000:]
        step = len(learned(output))
        assert done <= step <= done + 2, "it went on for more than the step it was in"
        assert (output / "stopped").read_text() == f"{step} {number.name}\n" and not (output / "finished").exists()
        assert f"stopped after step {step}: {number.name}" in answer[-1].stdout
        assert metrics(output)[-1] == {"step": step, "run/stopped_by": int(number)}
        (newest, *_) = finished_checkpoints(output / "checkpoints")
        assert read_manifest(newest).position.step == step
    assert f"resuming after step {before}" in answer[-1].stdout
    assert [line["step"] for line in learned(output)] == list(range(1, step + 1))


def test_a_run_leaves_when_its_time_is_over_and_goes_on_later(case: Case) -> None:
    short = spawn(1, case.command("timed", ["training.steps=2", "training.max_minutes=1e-6"]))
    assert short.returncode == 0 and "stopped after step 0: training.max_minutes" in short.stdout
    assert (case.out("timed") / "stopped").read_text() == "0 training.max_minutes\n"
    case.run("timed", 1, ["training.steps=2", "training.max_minutes=10"])
    assert (case.out("timed") / "finished").read_text() == "2\n" and not (case.out("timed") / "stopped").exists()


@pytest.mark.long
def test_the_supervisor_passes_a_signal_on_to_the_ranks(case: Case) -> None:
    """A run by the launcher, which also leaves nothing behind: no process, and nothing in shared memory."""
    run = soak.Supervised(case, "supervised", [*soak.LAYOUT, "training.steps=500", "eval.rows=4"])
    wait_for_steps(run.output, 1)
    run.process.send_signal(signal.SIGUSR1)
    assert run.process.wait(120) == 0, run.log.read_text()[-4000:]
    assert (run.output / "stopped").read_text().endswith(" SIGUSR1\n")
    assert not soak.left_behind(run)
    # DeepSpeed's shared-memory op would leave 66 MB a process, and would need a compiler
    assert "deepspeed_shm_comm" not in run.log.read_text() and not list(Path("/dev/shm").glob("deepspeed*"))


def test_the_supervisor_gives_up_where_nothing_moves_and_ends_with_a_mistake(tmp_path: Path) -> None:
    """The commands count their starts; no training is needed to see what is done with exit codes."""
    supervisor, starts = REPOSITORY / "examples" / "launch" / "run_forever.sh", tmp_path / "starts"
    variables = os.environ | {"RUN_FOREVER_TRIES": "3", "RUN_FOREVER_SECONDS": "0"}

    def supervise(script: str) -> tuple[int, int, str]:
        starts.write_text("")
        command = ["bash", "-c", f"echo >>{starts}; {script}"]
        ended = subprocess.run([supervisor, tmp_path, *command], env=variables, capture_output=True, text=True, timeout=60)
        return ended.returncode, starts.read_text().count("\n"), ended.stderr

    (tmp_path / "checkpoints").mkdir()
    assert supervise("exit 2")[:2] == (2, 1)
    # torchrun hides the exit code of its ranks, and a rank writes it to a file. That of an earlier start does not count
    write = 'echo 2 >"$MEGATRON_VOCAGNO_EXIT_CODE_FILE"'
    assert supervise(f"{write}; exit 1")[:2] == (2, 1)
    assert supervise(f"{write}; touch {tmp_path}/finished")[:2] == (0, 1)
    assert supervise("exit 130")[:2] == (130, 1)
    code, count, said = supervise("exit 7")
    assert (code, count) == (1, 3) and "exit code 7" in said and "giving up" in said
    # an exit code of 0 without a last word is a launcher that died
    assert supervise("exit 0")[:2] == (1, 3)
    assert supervise(f"echo 5 >{tmp_path}/finished")[:2] == (0, 1)
    # each death after a new checkpoint starts the count again
    step = f"n=$(wc -l <{starts}); echo step-$((n / 2)) >{tmp_path}/checkpoints/latest; [ $n -lt 9 ] || touch {tmp_path}/finished"
    assert supervise(f"{step}; [ $n -ge 9 ]")[:2] == (0, 9)


FULL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from tests.forked import SCRIPT, enter_own_namespaces, run
output, arguments, said = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
def held(): return sorted(path.parent.name for path in (output / "checkpoints").glob("*/manifest.json"))
def lives(): return run(2, [SCRIPT], arguments, os.environ | {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, said, os.getcwd())
def mount(*options): subprocess.run(["mount", *options, str(output)], check=True)
enter_own_namespaces()
output.mkdir(parents=True)
mount("-t", "tmpfs", "-o", "size=1280k", "tmpfs")
full = lives()
folders = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
mount("-o", "remount,size=64m")
Path(said).open("a").write("AFTER")
after = lives()
print("ANSWER " + json.dumps([full, folders, after, held()]))
"""


def test_a_full_disk_ends_all_ranks_with_one_message_and_leaves_the_older_checkpoint(case: Case, tmp_path: Path) -> None:
    """A file system of its own, large enough for one checkpoint; then a larger one."""
    arguments, said = case.command("full", [PP2, "training.steps=2", "checkpoint.every=1", "eval.rows=4"]), tmp_path / "said"
    said.touch()
    ended = spawn(1, [str(case.out("full")), json.dumps(arguments), str(said)], ("-c", FULL_DISK))
    if ended.returncode == 77:
        pytest.skip("no mount of its own: unshare is not allowed here")
    assert ended.returncode == 0, ended.stdout
    code, folders, code_after, held = json.loads(ended.stdout.split("ANSWER ")[1])
    said_full, said_after = said.read_text().split("AFTER")
    assert code == 2 and "Traceback" not in said_full, said_full
    root = case.out("full") / "checkpoints"
    assert said_full.count(f"error: no checkpoint could be written to {root}/step-00000002 (rank ") == 1, said_full[-3000:]
    assert "o space left on device" in said_full and f"{root}/step-00000001 is unchanged" in said_full
    assert folders == ["step-00000001"], "the broken one is removed, the older one is not"
    assert code_after == 0 and "resuming after step 1" in said_after, said_after[-3000:]
    assert held == ["step-00000001", "step-00000002"]


def test_broken_steps_are_named_with_their_documents_and_stop_the_run(case: Case) -> None:
    wild = {"optimizer": {"type": "AdamW", "params": {"lr": 1e30}}}
    overrides = ["training.steps=9", "training.max_nonfinite_steps=2", "checkpoint.every=1"]
    ended = spawn(1, case.command("wild", overrides, wild))
    assert ended.returncode == 2 and "2 steps in a row were not finite" in ended.stdout, ended.stdout[-3000:]
    lines = [orjson.loads(line) for line in (case.out("wild") / "not_finite.jsonl").read_bytes().splitlines()]
    assert len(lines) == 2 and lines[1]["step"] == lines[0]["step"] + 1
    documents = len(AlignedDataset.open(case.train).student_lengths)
    for line in lines:
        (named,) = line["documents"].values()
        assert (
            list(line["documents"]) == [str(case.train)]
            and named == sorted(set(named))
            and 0 <= named[0] <= named[-1] < documents
        )
        assert f"step {line['step']} was not finite" in ended.stdout
    # what was saved is from before
    assert read_manifest(finished_checkpoints(case.out("wild") / "checkpoints")[0]).position.step < lines[0]["step"]


def test_a_run_that_ends_on_a_broken_step_saves_weights_that_are_numbers_and_no_others(case: Case, tmp_path: Path) -> None:
    wild = {"optimizer": {"type": "AdamW", "params": {"lr": 1e30}}}
    ended = spawn(1, case.command("ends-broken", ["training.steps=2", "checkpoint.every=2", "eval.rows=4"], wild))
    assert ended.returncode == 0 and "step 2 was not finite" in ended.stdout, ended.stdout[-3000:]
    (kept,) = finished_checkpoints(case.out("ends-broken") / "checkpoints")
    assert read_manifest(kept).position.step == 2 and (case.out("ends-broken") / "finished").read_text().strip() == "2"

    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=SMALL_VOCABULARY, **case.student))
    student.model.norm.weight.data[0] = math.inf
    student.save_pretrained(tmp_path)
    infinite = [f"student.pretrained={tmp_path}", "training.steps=1", "eval.rows=4"]
    ended = spawn(1, case.command("ends-infinite", infinite))
    assert ended.returncode == 2 and "the student's weights are not finite" in ended.stdout, ended.stdout[-3000:]
    assert not (case.out("ends-infinite") / "finished").exists()
    assert not checkpoint_folders(case.out("ends-infinite") / "checkpoints")


def test_a_teacher_that_gives_nan_on_some_documents_leaves_their_tokens_unguided(case: Case, tmp_path: Path) -> None:
    data = AlignedDataset.open(case.train)
    ids = np.concatenate([data.teacher(document, 0, int(length)) for document, length in enumerate(data.teacher_lengths)])
    token = int(np.abs(np.bincount(ids) - len(ids) / 100).argmin())  # about one token in a hundred
    broken = shutil.copytree(case.teacher, tmp_path / "teacher")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    output = case.run("nan-teacher", 2, [PP2, f"teacher.path={broken}", "training.steps=3", "eval.rows=4"])
    lines = learned(output)
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["guidance/unmapped_nan"] < 1 and math.isfinite(line["loss/train"]) and line["loss/nonfinite_tokens"] == 0
        assert line["optimizer/skipped_steps"] == 0 and line["guidance/share_kept"] > 0
    assert len(checkpoint_folders(output / "checkpoints")) == 1 and not (output / "not_finite.jsonl").exists()


def test_what_one_rank_alone_cannot_read_ends_all_of_them(case: Case, tmp_path: Path) -> None:
    """Without a launcher that would end the others: a path that leads to the data from the folder of the first rank alone."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "data").symlink_to(case.train)
    codes, said = spawn_each([case.command("one-sided", [PP2, "data.train=data"])] * 2, folders)
    assert codes == [2, 2] and said.count("error: ") == 1, (codes, said)
    assert "error: data.train: data is not a dataset" in said and "This happened only on rank 1" in said
