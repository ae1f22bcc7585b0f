"""The command. benchmarks/gpu/__init__.py describes it."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu.check import check
from benchmarks.gpu.record import Skipped, Task
from megatron_vocagno.command import Parser, positive_float, run_command

OURS = ("benchmarks", "megatron_vocagno", "tests")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.part:
        return run_part(options)
    signal.signal(signal.SIGTERM, _stop)
    return run_command(lambda: check(options), "the parts that had ended are written")


def parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.gpu",
        "",
        "Check the kernels on a GPU, and measure head, selection, training and scoring. Needs no network.",
        "python -m benchmarks.gpu --minutes 8",
        "0 all checks passed, 1 a check failed or did not end, or a part crashed, 2 an error that you can fix, 130 Ctrl-C",
    )
    parser.add_argument("--minutes", type=positive_float, default=8.0, metavar="N", help="minutes for all parts (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the results (default: docs/gpu)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; the figures are meaningless")
    # how a part is started
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def run_part(options: argparse.Namespace) -> int:
    """Run one part in this process. If a package is missing, the part is skipped."""
    task = Task(options.record, options.seconds, options.rehearse)
    try:
        importlib.import_module(f"benchmarks.gpu.{options.part}").run(task)
    except Skipped as reason:
        task.skip(str(reason))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in OURS:
            raise
        task.skip(f"{package} is not installed")
    return 0


def _stop(number: int, frame: object) -> NoReturn:
    """End by an exception, which ends the processes of the current part."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
