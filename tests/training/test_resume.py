"""A run that was killed and started again ends with the same weights as an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vocagno.engine.manifest import MANIFEST, RUN, checkpoint_folders, newest_checkpoint, read_manifest
from megatron_vocagno.files import sha256
from tests.runs import SMALL_TEACHER_ROWS, Case, metrics, spawn

pytestmark = pytest.mark.slow

OVERRIDES = ["training.steps=6", "checkpoint.every=2", "checkpoint.keep_last=3", "eval.every=3"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted((checkpoint / "student").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def lines_by_step(output: Path) -> list[dict[str, float]]:
    timed = ("throughput/", "teacher/seconds", "teacher/share_of_time", "teacher/tokens_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in metrics(output)]


KILLED = """
import os, signal, sys
from megatron_vocagno import pretrain
from megatron_vocagno.engine import checkpoint
works, saves = checkpoint._sync_and_hash, []
def killed(*arguments):
    saves.append(arguments)
    if len(saves) == 2 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return works(*arguments)
checkpoint._sync_and_hash = killed
sys.exit(pretrain.main(sys.argv[1:]))
"""
"""The first rank kills itself in the middle of its second save."""


@pytest.mark.parametrize(
    ("layout", "processes", "stages", "zero"),
    [("pp2", 2, 2, 1), pytest.param("plain-zero3", 2, 0, 3, marks=pytest.mark.long)],
    ids=["pp2", "plain-zero3"],
)
def test_killed_and_started_again_equals_never_stopped(case: Case, layout: str, processes: int, stages: int, zero: int) -> None:
    tied = stages > 0
    overrides = [*OVERRIDES, f"parallel.pipeline_stages={stages}", f"student.config.tie_word_embeddings={str(tied).lower()}"]
    if zero == 3:
        overrides += ["guidance.unit=chunk", "guidance.weighting=control_variate"]
    settings = {"zero_optimization": {"stage": zero}}
    straight = case.run(f"{layout}-straight", processes, overrides, settings)

    name = f"{layout}-killed"
    arguments, output = case.command(name, overrides, settings), case.out(name)
    killed = spawn(processes, arguments, ("-c", KILLED))
    assert killed.returncode == -9, killed.stdout[-4000:]
    at = {folder.name: (folder / "manifest.json").exists() for folder in checkpoint_folders(output / "checkpoints")}
    assert at == {"step-00000002": True, "step-00000004": False}
    resumed = spawn(processes, arguments)
    assert resumed.returncode == 0 and "resuming after step 2" in resumed.stdout, resumed.stdout[-4000:]
    assert "autograd kernel" not in resumed.stdout, "autograd has recorded the copying of tied weights"

    ends = [newest_checkpoint(out, print) for out in (straight, output)]
    assert ends[0] is not None and ends[1] is not None
    a, b = weights(ends[0]), weights(ends[1])
    assert a.keys() == b.keys() and len(a) == 30 - tied
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines_by_step(straight) == lines_by_step(output), "each step stands once in metrics.jsonl, with the same numbers"
    assert len(lines_by_step(straight)) == 6 + 3


COMPILER = """
import sys
from megatron_vocagno.pretrain import main
code = main(sys.argv[1:])
print("compiler:", "torch._inductor.compile_fx" in sys.modules)
sys.exit(code)
"""


def test_a_run_does_not_load_the_compiler_of_torch(case: Case) -> None:
    """DeepSpeed's Muon would: a second of every start."""
    overrides = ["training.steps=1", "training.schedule.warmup_steps=1", "eval.rows=2"]
    finished = spawn(1, case.command("uncompiled", overrides), ("-c", COMPILER), fresh=True)
    assert finished.returncode == 0 and "compiler: False" in finished.stdout, finished.stdout[-4000:]


def as_an_earlier_release_named_it(checkpoint: Path) -> None:
    """Rename a field of run.json, and remove new ones, as if an earlier release had written the checkpoint."""
    run, manifest = (json.loads((checkpoint / name).read_text()) for name in (RUN, MANIFEST))
    run["guidance"]["chunks"] = run["guidance"].pop("equal_parts")
    for name in ("unit", "weighting", "threshold", "strength", "clip"):
        del run["guidance"][name]
    (checkpoint / RUN).write_text(json.dumps(run))
    manifest["files"][RUN] = {"bytes": (checkpoint / RUN).stat().st_size, "sha256": sha256(checkpoint / RUN)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_broken_checkpoint_is_named_and_the_older_one_resumed(case: Case) -> None:
    """Though only one of the two ranks reads the broken file."""
    output = case.run("broken", 2, ["training.steps=4", "checkpoint.every=2", "guidance.equal_parts=4"])
    newest, older = checkpoint_folders(output / "checkpoints")
    shares = [list(read_manifest(newest).files)[rank::2] for rank in range(2)]
    victim = next(newest / name for name in shares[1] if name.startswith("student/layer_"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    as_an_earlier_release_named_it(older)
    resumed = spawn(2, case.command("broken", ["training.steps=6", "guidance.equal_parts=4"]))
    assert resumed.returncode == 0
    assert (
        f"skipping checkpoint {newest}: student/{victim.name} has changed since it was written: its sha256 differs"
        in resumed.stdout
    )
    assert "note: from here on training.steps = 6 (was 4)" in resumed.stdout
    assert "from here on guidance." not in resumed.stdout, "another name is not another value"
    assert "resuming after step 2" in resumed.stdout and older.name == "step-00000002"
    # once at the end, a run has nothing to do and changes nothing
    lines = lines_by_step(output)
    again = spawn(2, case.command("broken", ["training.steps=6"]))
    assert again.returncode == 0 and "resuming after step 6" in again.stdout
    assert lines_by_step(output) == lines
    # where none is whole, starting over would remove what might be mended
    folders = checkpoint_folders(output / "checkpoints")
    for folder in folders:
        (folder / "engine.json").write_text("{}")
    refused = spawn(2, case.command("broken", ["training.steps=6"]))
    assert refused.returncode == 2 and f"none of the {len(folders)} checkpoints in " in refused.stdout, refused.stdout[-2000:]
    assert checkpoint_folders(output / "checkpoints") == folders and lines_by_step(output) == lines


LOSES_ITS_DISK = """
import sys
from megatron_vocagno import command, pretrain
from megatron_vocagno.training import loop
from megatron_vocagno.engine import checkpoint, processes, state
def lost(*_): raise OSError("the disk of this machine is gone")
ranks = processes.start()
loop.start, command.RANK0_SECONDS = lambda: ranks, 0
for module, reads in ((checkpoint, "altered"), (state, "load_file")):
    works = getattr(module, reads)
    if ranks.rank == 1: setattr(module, reads, lost)
    assert pretrain.main(sys.argv[1:]) == 2
    setattr(module, reads, works)
processes.stop()
"""


def test_a_checkpoint_that_one_rank_cannot_read_ends_all_ranks_and_is_not_passed_over(case: Case) -> None:
    """Neither while it is hashed nor while it is loaded: a machine that loses its disk must not cost the run its checkpoints."""
    overrides = ["training.steps=2", "checkpoint.every=1"]
    output = case.run("lost", 1, overrides)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    ended = spawn(2, case.command("lost", overrides), ("-c", LOSES_ITS_DISK))
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert ended.stdout.count("error: ") == ended.stdout.count("the disk of this machine is gone") == 2, ended.stdout
    assert "This happened only on rank 1" in ended.stdout and "could not be loaded (rank 1): layer_0001" in ended.stdout, (
        ended.stdout
    )
    assert "skipping checkpoint" not in ended.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_resuming_another_run_is_refused_and_changes_nothing(case: Case) -> None:
    output = case.run("other", 1, ["training.steps=1"])
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    refused = spawn(1, case.command("other", ["training.seed=1"]))
    assert refused.returncode == 2 and "was written with training.seed = 0, this run has 1" in refused.stdout, refused.stdout[
        -3000:
    ]
    assert "Traceback" not in refused.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_the_teacher_is_nowhere_in_a_checkpoint(case: Case) -> None:
    """Neither its tensors nor states of an optimizer for them: what is saved counts the student's numbers and no more."""
    output = case.run("frozen", 1, ["training.steps=1"])
    checkpoint = newest_checkpoint(output, print)
    assert checkpoint is not None
    student = sum(tensor.numel() for tensor in weights(checkpoint).values())
    states = [load_file(file) for file in sorted((checkpoint / "optimizer").glob("*.safetensors"))]
    shapes = [tensor.shape for file in states for tensor in file.values()]
    assert not any(SMALL_TEACHER_ROWS in shape for shape in shapes), "a matrix of the teacher's vocabulary"
    # the float32 weights are their own masters; two moments each
    assert sum(shape.numel() for shape in shapes) == 2 * student
