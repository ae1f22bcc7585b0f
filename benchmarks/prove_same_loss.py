"""Compare the quickstart's first steps at another revision with those of this working tree, number by number.

    make prove-same-loss REV=main~3

Each side builds its own dataset from the same texts, and trains with its own code, run file and DeepSpeed configuration, on the
files that `make demo` left in .demo/. Exit code 0: all numbers are the same, or within --tolerance. Exit code 1: a number
differs, and the first step that differs is shown. Exit code 2: the revision does not exist, or one side does not run.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_vocagno.command import Parser, positive_int, run_command
from megatron_vocagno.errors import UserError
from megatron_vocagno.training.monitor import read_metrics

DEMO = Path(".demo").absolute()
TEXTS = {"train": 400, "heldout": 20}
"""Number of documents read from each part of the demo's corpus."""
COMPARED = (
    "loss/train",
    "loss/all_tokens",
    "optimizer/grad_norm",
    "guidance/share_kept",
    "guidance/threshold",
    "eval/bits_per_byte",
)
console = Console(highlight=False, soft_wrap=True)

Lines = Sequence[Mapping[str, float]]


class NotProved(UserError):
    """The two losses cannot be compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return run_command(lambda: compare(args))


def compare(args: argparse.Namespace) -> int:
    if not (DEMO / "teacher" / "model.safetensors").exists():
        raise NotProved("no teacher in .demo/: run `make demo` first")
    with tempfile.TemporaryDirectory(prefix="same-loss-") as name:
        folder = Path(name)
        there = check_out(args.revision, folder / "revision")
        ours, theirs = (quickstart(tree, folder / out, args.steps) for tree, out in ((Path.cwd(), "ours"), (there, "theirs")))
    return report(args.revision, theirs, ours, args.tolerance)


def parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.prove_same_loss",
        "REVISION",
        "Compare the quickstart's first steps at a revision with those of this working tree, number by number.",
        "python -m benchmarks.prove_same_loss HEAD~3 --steps 8",
        "0 equal within --tolerance, 1 the loss differs, 2 an error that you can fix, 130 Ctrl-C",
    )
    parser.add_argument("revision", metavar="REVISION", help="commit, branch or tag to compare with")
    parser.add_argument("--steps", type=positive_int, default=8, metavar="N", help="optimizer steps (default: 8)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="largest allowed relative difference, as a share (default: 0, the same bits)",
    )
    return parser


def check_out(revision: str, folder: Path) -> Path:
    """Write the tree of a revision into `folder`. The repository does not change."""
    archive = subprocess.run(["git", "archive", "--format=tar", revision], stdout=subprocess.PIPE, check=False)
    if archive.returncode:
        raise SystemExit(2)  # git has printed the reason
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def quickstart(tree: Path, folder: Path, steps: int) -> Lines:
    """Run the quickstart in `folder` with the code in `tree`; returns its metrics."""
    programs = Path(sys.executable).parent
    # the launcher starts the first `python` of PATH, and its script would otherwise import the installed package
    variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu"}
    student = DEMO / "student-hf"
    for part, documents in TEXTS.items():
        texts = folder / f"{part}.jsonl"
        texts.parent.mkdir(exist_ok=True)
        with (DEMO / "corpus" / f"{part}.jsonl").open("rb") as corpus:
            texts.write_bytes(b"".join(islice(corpus, documents)))
        build = [sys.executable, "-m", "tools.preprocess.build_dataset", str(texts), "--out", str(folder / part)]
        call([*build, "--student", str(student), "--teacher", str(DEMO / "teacher"), "--workers", "1"], tree, variables)
    values = {
        "output": folder / "run",
        "data.train": folder / "train",
        "data.valid": folder / "heldout",
        "teacher.path": DEMO / "teacher",
        "training.steps": steps,
        "eval.rows": 8,
    }
    train = [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), "examples/pretrain_vocagno.py"]
    train += ["examples/quickstart.toml", "--deepspeed_config", "ds_configs/cpu_pp2.json"]
    call([*train, *(part for name, value in values.items() for part in ("--set", f"{name}={value}"))], tree, variables)
    return read_metrics(folder / "run")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def call(command: Sequence[str], tree: Path, variables: Mapping[str, str]) -> None:
    console.print(f"[dim]{tree.name}$ {' '.join(command)}[/]")
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        console.print(f"{done.stdout[-4000:]}\nerror: exit code {done.returncode} of the command above, in {tree}", markup=False)
        raise SystemExit(2)


def report(revision: str, theirs: Lines, ours: Lines, tolerance: float) -> int:
    """Print a table of the comparison; returns the exit code."""
    table = Table(title=f"{revision} and the working tree", title_justify="left")
    for title in ("number", "compared", "largest relative difference"):
        table.add_column(title)
    same, differences = True, []
    for name in COMPARED:
        pairs = paired(name, theirs, ours)
        gaps = [(step, relative(a, b), a, b) for step, a, b in pairs]
        worst = max((gap for _, gap, _, _ in gaps), default=math.inf)
        shown = f"{worst:.2g}" if worst else "0: the same bits"
        same &= worst <= tolerance
        differences += [f"{name}, step {step:.0f}: {a!r} -> {b!r}" for step, gap, a, b in gaps if gap > 0][:1]
        table.add_row(name, f"{len(pairs)}", shown if pairs else "missing on both sides")
    console.print(table)
    for line in differences:
        console.print(line, markup=False)
    console.print("the loss is the same" if same else "THE LOSS IS NOT THE SAME", style="bold green" if same else "bold red")
    return 0 if same else 1


def paired(name: str, theirs: Lines, ours: Lines) -> list[tuple[float, float | None, float | None]]:
    """(step, their number, our number) of each step. If a side lacks a number, it is missing (None)."""
    a, b = ({line["step"]: line[name] for line in lines if name in line} for lines in (theirs, ours))
    return [(step, a.get(step), b.get(step)) for step in sorted(a.keys() | b.keys())]


def relative(a: float | None, b: float | None) -> float:
    """Relative difference: 0 for the same bits.

    It is infinite if a number is missing, or if two numbers differ and one of them is not finite.
    """
    if a is None or b is None:
        return math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


if __name__ == "__main__":
    sys.exit(main())
