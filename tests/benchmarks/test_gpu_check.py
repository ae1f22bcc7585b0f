"""The check on a GPU as a command: processes, time limits, exit codes, files, and a rehearsal of all parts."""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from benchmarks.gpu import kernels, tests
from benchmarks.gpu.check import DOCS, PARTS, Plan, check, run_part
from benchmarks.gpu.page import MEANINGLESS, Part, Report, slug, table
from benchmarks.gpu.record import Record, Row, Task
from tests.runs import REPOSITORY

OBJECTIVE = REPOSITORY / "megatron_vocagno" / "objective"
ROWS = """
import sys
from pathlib import Path
from benchmarks.gpu.record import Task
task = Task(Path(sys.argv[sys.argv.index("--record") + 1]), 60, rehearse=True)
"""
"""The beginning of a part."""
NEITHER = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *places: None if name.partition(".")[0] in {names} else find(name, *places)
from benchmarks.gpu.__main__ import main
sys.exit(main())
"""
"""The command, on a machine that lacks packages."""
SLOW = """
import sys
from benchmarks.gpu import __main__ as command, check
part = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
parts = [check.Plan("slow", 1, True, (sys.executable, "-c", part, sys.argv[1]))]
command.check = lambda options: check.check(options, parts)
sys.exit(command.main(["--rehearse", "--out", sys.argv[2]]))
"""
"""The command with one part, which writes its process id into a file and never ends."""
EARLY = ("deepspeed", "pytest")
LATER = (*EARLY, "transformers", "huggingface_hub", "tokenizers", "pydantic", "orjson", "rich", "pyarrow", "safetensors")


def part(text: str, name: str = "part", checks: bool = True) -> Plan:
    return Plan(name, 1, checks, (sys.executable, "-c", ROWS + text))


def options(folder: Path, minutes: float = 1.0) -> argparse.Namespace:
    return argparse.Namespace(minutes=minutes, out=folder, rehearse=True)


def without(plan: Plan, packages: tuple[str, ...]) -> Plan:
    return replace(plan, command=(sys.executable, "-c", NEITHER.format(names=packages)))


def results(folder: Path) -> dict[str, dict]:
    [file] = folder.glob("*.json")
    return {found["name"]: found for found in json.loads(file.read_text())["parts"]}


def alive(pid: int) -> bool:
    """Not as a zombie."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_that_crashes_is_reported_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        part("task.add('kept', '', {'ms': 1.5})\nraise SystemExit('no such | kernel')", "broken"),
        part("task.check('sums', True, {'cases': 3})", "next"),
    ]
    assert check(options(tmp_path), parts) == 1
    found = results(tmp_path)
    assert (found["broken"]["state"], found["broken"]["reason"]) == ("crashed", "no such | kernel")
    assert found["broken"]["record"]["rows"][0]["numbers"] == {"ms": 1.5}, "rows before the crash are kept"
    assert found["next"]["state"] == "finished"
    printed = capsys.readouterr().out
    assert "| broken | kept |  | 1.500 |  |  |  |" in printed and "| crashed: no such \\| kernel |" in printed
    assert "| next | sums |  |  |  | 3 cases | passed |" in printed and MEANINGLESS in printed
    [page] = tmp_path.glob("*-rehearsal.md")
    assert MEANINGLESS in page.read_text() and table([]).splitlines()[0] in page.read_text()


def test_a_check_that_fails_sets_the_exit_code_and_other_results_do_not(tmp_path: Path) -> None:
    assert check(options(tmp_path), [part("task.add('a', result='out of memory')"), part("task.record.skipped = 'no'", "b")]) == 0
    assert check(options(tmp_path), [part("task.check('sums', False, why='differ')")]) == 1
    [row] = results(tmp_path)["part"]["record"]["rows"]
    assert (row["result"], row["failed"]) == ("FAILED differ", True)


@pytest.mark.slow
def test_a_part_is_ended_with_its_children_and_keeps_its_rows(tmp_path: Path) -> None:
    sleep = "import subprocess, time\nchild = subprocess.Popen(['sleep', '300'])\ntask.add('child', '', {'pid': child.pid})\n"
    plan = part(sleep + "time.sleep(300)")
    begin = time.monotonic()
    found = run_part(plan, tmp_path, limit=8.0, rehearse=True)
    assert 8 < time.monotonic() - begin < 20
    [row] = found.record.rows
    assert found.state == "time limit" and not alive(int(row.numbers["pid"]))
    assert found.failed and not replace(found, must_end=False).failed, "checks are incomplete, measurements are not wrong"
    # a part that has ended may leave a child too
    left = run_part(part(sleep), tmp_path, limit=30.0, rehearse=True)
    assert left.state == "finished" and not alive(int(left.record.rows[0].numbers["pid"]))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_current_part(sent: int, code: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(pid), str(tmp_path / "out")], env=environment, stderr=subprocess.PIPE
    ) as process:
        while not pid.exists() or not pid.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(timeout=30) == code
    assert not alive(int(pid.read_text()))


@pytest.mark.slow
def test_a_part_is_skipped_if_a_package_is_missing_and_crashes_if_a_module_of_ours_is(tmp_path: Path) -> None:
    missing = run_part(without(Plan("teachers", 1), ("transformers",)), tmp_path, limit=60.0, rehearse=True)
    assert (missing.state, missing.reason, missing.failed) == ("skipped", "transformers is not installed", False)
    unknown = run_part(Plan("no_such_part", 1), tmp_path, limit=60.0, rehearse=True)
    assert unknown.state == "crashed" and unknown.failed and "benchmarks.gpu.no_such_part" in unknown.reason


def test_time_that_a_part_does_not_use_goes_to_later_parts(tmp_path: Path) -> None:
    given = "task.add('limit', '', {'s': float(sys.argv[sys.argv.index('--seconds') + 1])})"
    check(options(tmp_path, minutes=2), [part(given, "first"), part(given, "last")])
    first, last = (results(tmp_path)[name]["record"]["rows"][0]["numbers"]["s"] for name in ("first", "last"))
    assert first == 60 and 100 < last <= 120


@pytest.mark.slow
def test_without_a_gpu_nothing_is_measured_and_a_rehearsal_needs_a_folder(tmp_path: Path) -> None:
    for arguments, told in (
        (["--out", str(tmp_path / "out")], "no GPU was found"),
        (["--rehearse"], "meaningless: choose a folder"),
        (["--rehearse", "--out", str(DOCS / "mine")], "meaningless: choose a folder"),
    ):
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "") and told in done.stderr
    assert not (tmp_path / "out").exists() and not (DOCS / "mine").exists()


def test_results_are_named_by_day_and_card(tmp_path: Path) -> None:
    record = Record(
        [Row("copy", "", {"ms": 0.5, "TB/s": 4.25, "share of it": 0.5, "broken": None})], {"card": "NVIDIA H100 80GB"}
    )
    report = Report("command", date(2026, 11, 30), rehearsal=False, parts=[Part("card", "finished", "", 1.0, record)])
    report.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"2026-11-30-nvidia-h100-80gb{suffix}" for suffix in (".json", ".md")}
    page = (tmp_path / "2026-11-30-nvidia-h100-80gb.md").read_text()
    assert "| card | copy |  | 0.500 |  | 4.25 TB/s, 50.0% share of it, not finite broken |  |" in page
    assert MEANINGLESS not in page and slug("A B/C") == "a-b-c"


def test_a_number_that_is_not_finite_is_written(tmp_path: Path) -> None:
    task = Task(tmp_path / "part.json", 60, rehearse=True)
    task.check("nan", False, {"error": float("nan"), "more": float("inf")})
    assert Record.read(task.file).rows[0].numbers == {"error": None, "more": None}


def test_every_kernel_is_launched_or_called_by_one_that_is() -> None:
    """The part `kernels` fails if a kernel of its list was not launched, so its list must have all of them."""
    jitted: dict[str, set[str]] = {}
    for path in OBJECTIVE.glob("*_triton.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
                jitted[node.name] = {call.func.id for call in ast.walk(node) if _calls_a_name(call)}
    called = set().union(*jitted.values()) & jitted.keys()
    assert len(jitted) > 15
    assert jitted.keys() - called == set(kernels.KERNELS)


def test_every_file_of_kernel_tests_is_run() -> None:
    assert set(tests.FILES) == {path.name for path in tests.KERNELS.glob("test_*.py")}


def _calls_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.long
@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    """The parts before `step` without most packages, those before `quickstart` without DeepSpeed and pytest."""
    names = [plan.name for plan in PARTS]
    step, quickstart = names.index("step"), names.index("quickstart")
    parts = [
        *(without(plan, LATER) for plan in PARTS[:step]),
        *(without(plan, EARLY) for plan in PARTS[step:quickstart]),
        *PARTS[quickstart:],
    ]
    before = sorted(DOCS.rglob("*"))
    assert check(options(tmp_path, minutes=10), parts) == 0
    found = results(tmp_path)
    assert list(found) == names
    demo = (REPOSITORY / ".demo" / "teacher" / "model.safetensors").exists()
    for name, ended in found.items():
        if name == "quickstart" and not demo:
            assert ended["state"] == "skipped" and "make demo" in ended["reason"]
        else:
            assert ended["state"] == "finished" and ended["record"]["rows"], (name, ended)
    launched = {row["case"]: row["result"] for row in found["kernels"]["record"]["rows"] if row["case"].startswith("launches of")}
    assert launched == {f"launches of {kernel}": "passed" for kernel in kernels.KERNELS}
    [page] = tmp_path.glob("*-rehearsal.md")
    text = page.read_text(encoding="utf-8")
    assert MEANINGLESS in text and all(f"| {name} |" in text for name in names) and "MFU" not in text
    assert sorted(DOCS.rglob("*")) == before
