"""A Slurm that runs jobs here: strict about what it is given, and otherwise as the manual pages of Slurm say.

    sbatch, srun, scontrol and scancel are links to `fake_slurm.py NAME`, made by `install`.

A job is run before `sbatch` returns, in a copy of its script as Slurm does it, and again while it is put back into the
queue. Nodes are addresses of this machine. Signals reach the batch shell and the tasks that `srun` started, not their children.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

NUMBER, TIME = r"[1-9]\d*", r"\d{1,2}:\d\d:\d\d"
# option: what its value looks like; None: it has none
SBATCH: dict[str, str | None] = {
    "job-name": r"[\w.-]+",
    "nodes": NUMBER,
    "ntasks": NUMBER,
    "ntasks-per-node": NUMBER,
    "gpus-per-node": NUMBER,
    "cpus-per-task": NUMBER,
    "mem": r"\d+[KMGT]",
    "time": TIME,
    "signal": r"(B:)?(USR1|TERM)@\d{1,5}",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"(%[xj]|[\w./-])+",
    "array": r"\d+(-\d+)?",
    "dependency": r"afterok:\d+",
    "parsable": None,
}
SRUN: dict[str, str | None] = {"kill-on-bad-exit": "[01]", "wait": r"\d+", "cpus-per-task": NUMBER, "ntasks": NUMBER}


def install(folder: Path) -> None:
    """The commands in `folder`/bin."""
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        command.chmod(0o755)


def job(folder: Path, number: int) -> dict[str, Any]:
    """What became of a job: `exit_codes` of its starts, a list for each task of an array."""
    record: dict[str, Any] = json.loads((folder / f"{number}.json").read_text())
    return record


def signal_job(folder: Path, name: str, *, batch_shell: bool) -> int:
    """A signal to the tasks that run, as at the end of the time limit; also to the shell, as by scancel. How many got it."""
    pids = [int(path.name) for path in (folder / "tasks").iterdir()]
    pids += [int((folder / "shell").read_text())] if batch_shell else []
    for pid in pids:
        os.kill(pid, signal.Signals[f"SIG{name}"])
    return len(pids)


def refuse(message: str) -> NoReturn:
    sys.exit(f"fake Slurm: error: {message}")


def parse(known: dict[str, str | None], arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options before the first argument that is none, and the rest."""
    options, rest = {}, list(arguments)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).removeprefix("--").partition("=")
        if name not in known:
            refuse(f"unrecognized option --{name}")
        form = known[name]
        if form is None and equals:
            refuse(f"--{name} takes no value")
        if form is not None and not re.fullmatch(form, value):
            refuse(f"--{name}={value}: not of the form {form}")
        options[name] = value
    return options, rest


def script_options(script: Path) -> dict[str, str]:
    """Of the lines #SBATCH, which must come before the first command."""
    options: dict[str, str] = {}
    lines = script.read_text().splitlines()
    if not lines[0].startswith("#!"):
        refuse(f"{script} does not start with #!")
    commands = False
    for line in lines[1:]:
        commands = commands or bool(line.strip() and not line.startswith("#"))
        if re.match(r"\s*#\s*SBATCH", line):
            if commands or not line.startswith("#SBATCH --"):
                refuse(f"Slurm would pass over this line: {line}")
            found, rest = parse(SBATCH, line.removeprefix("#SBATCH ").split())
            if rest or found.keys() & options.keys():
                refuse(f"not understood, or twice: {line}")
            options |= found
    return options


def sbatch(arguments: Sequence[str]) -> None:
    folder = Path(os.environ["FAKE_SLURM"])
    given, rest = parse(SBATCH, arguments)
    options = script_options(Path(rest[0])) | given
    if after := options.get("dependency"):
        codes = job(folder, int(after.partition(":")[2]))["exit_codes"]
        if any(starts[-1] for starts in codes):
            refuse(f"{after}: that job failed, this one would wait for ever")
    number = free_number(folder)
    record: dict[str, Any] = {"exit_codes": []}
    save(folder, number, record)
    for variables in tasks_of_array(options.get("array")):
        record["exit_codes"].append(list(run_job(folder, number, Path(rest[0]), rest[1:], options, variables)))
        save(folder, number, record)
    print(number if "parsable" in options else f"Submitted batch job {number}")


def tasks_of_array(array: str | None) -> Iterator[dict[str, str]]:
    if array is None:
        yield {}
        return
    first, _, last = array.partition("-")
    ids = range(int(first), int(last or first) + 1)
    for i in ids:
        bounds = {"MIN": ids[0], "MAX": ids[-1], "COUNT": len(ids), "ID": i}
        yield {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in bounds.items()}


def run_job(
    folder: Path, number: int, script: Path, arguments: Sequence[str], options: dict[str, str], variables: dict[str, str]
) -> Iterator[int]:
    """Exit codes of its starts."""
    spooled = folder / "slurm_script"
    shutil.copy(script, spooled)
    nodes, a_node = int(options.get("nodes", 1)), options.get("ntasks-per-node")
    variables = variables | {
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]",
        "SLURM_NTASKS": str(nodes * int(a_node) if a_node else options.get("ntasks", 1)),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }
    if a_node:
        variables["SLURM_NTASKS_PER_NODE"] = a_node
    task = variables.get("SLURM_ARRAY_TASK_ID")  # each task of an array is a job of its own, with a log of its own
    name = options["output"].replace("%x", options["job-name"]).replace("%j", f"{number}_{task}" if task else str(number))
    mark = folder / "requeue"
    for restart in range(5):
        mark.unlink(missing_ok=True)
        count = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        mode = "ab" if restart and options.get("open-mode") == "append" else "wb"
        with (folder / name).open(mode) as log:
            shell = subprocess.Popen(
                ["bash", str(spooled), *arguments], env=os.environ | variables | count, stdout=log, stderr=log
            )
            (folder / "shell").write_text(str(shell.pid))
            yield shell.wait()
        if not mark.exists():
            return
        if "requeue" not in options:
            refuse("scontrol requeue of a job that was submitted without --requeue")
    refuse("put back into the queue again and again")


def srun(arguments: Sequence[str]) -> int:
    options, command = parse(SRUN, arguments)
    n, a_node = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    running = Path(os.environ["FAKE_SLURM"]) / "tasks"
    running.mkdir(exist_ok=True)
    tasks = []
    for rank in range(n):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % a_node, "SLURM_NODEID": rank // a_node}
        task = subprocess.Popen(command, env=os.environ | {name: str(value) for name, value in place.items()})
        (running / str(task.pid)).touch()
        tasks.append(task)
    first_end = None
    while any(task.poll() is None for task in tasks):
        for task in tasks:
            if task.poll() is not None:
                (running / str(task.pid)).unlink(missing_ok=True)
                first_end = first_end or time.monotonic()
        failed = options["kill-on-bad-exit"] == "1" and any(task.poll() for task in tasks)
        waited_enough = first_end and int(options["wait"]) and time.monotonic() - first_end > int(options["wait"])
        if failed or waited_enough:
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    shutil.rmtree(running)
    return max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks))


def scontrol(arguments: Sequence[str]) -> None:
    match arguments:
        case ["show", "hostnames", nodes] if of_nodes := re.fullmatch(r"127\.0\.0\.\[1-(\d+)\]", nodes):
            print("\n".join(f"127.0.0.{i}" for i in range(1, int(of_nodes[1]) + 1)))
        case ["requeue", number] if number == os.environ["SLURM_JOB_ID"]:
            (Path(os.environ["FAKE_SLURM"]) / "requeue").touch()
        case _:
            refuse(f"scontrol {' '.join(arguments)}")


def scancel(arguments: Sequence[str]) -> None:
    match arguments:
        case [number] if number.isdigit():
            signal_job(Path(os.environ["FAKE_SLURM"]), "TERM", batch_shell=True)
        case ["--signal=USR1", number] if number.isdigit():
            signal_job(Path(os.environ["FAKE_SLURM"]), "USR1", batch_shell=False)
        case _:
            refuse(f"scancel {' '.join(arguments)}")


def save(folder: Path, number: int, record: dict[str, Any]) -> None:
    (folder / f"{number}.json").write_text(json.dumps(record))


def free_number(folder: Path) -> int:
    """Of a job that had none before, and whose port (20000 + its last four digits) nobody has."""
    number = 70_001
    while (folder / f"{number}.json").exists() or taken(20_000 + number % 10_000):
        number += 1
    return number


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](sys.argv[2:]))
