"""The command: read the run, then train it.

    deepspeed examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json [--set a.b=c]
    python examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json --dry-run --gpus 32

Exit code 0: the run reached its last step, or was asked to leave and has saved (SIGTERM, SIGUSR1, training.max_minutes). 2: the
user has something to mend, and the message says what. 1: another run is at work in its folder. 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vocagno.config import OccupiedError, Run, RunError, SharedError
from megatron_vocagno.run_file import load_run
from megatron_vocagno.stopping import Stopper

PATIENCE = 5.0
"""Seconds that a rank waits before it speaks of an error that the first rank has most likely met too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--dry-run" in arguments:
        return _dry_run(arguments)
    options = _parse(arguments)
    try:
        run = load_run(options.run, options.set)
        if options.print_config:
            print(run.model_dump_json(indent=2))
            return 0
        if options.deepspeed_config is None:
            raise RunError("--deepspeed_config is missing: it owns batch sizes, precision and the optimizer (see ds_configs/)")
    except RunError as error:
        return _refuse(error)
    try:
        # listening comes first: a signal while DeepSpeed is imported, or the teacher is read, must not end the process
        with Stopper(run.training.max_minutes) as stopper:
            problem = _train(run, options.deepspeed_config, stopper)
    except KeyboardInterrupt:
        if _is_first():
            print("interrupted; the same command goes on from the newest whole checkpoint", file=sys.stderr, flush=True)
        return 130
    return 0 if problem is None else _refuse(problem)


def _dry_run(arguments: Sequence[str]) -> int:
    """Under a launcher each rank finds the same: the first one says it."""
    from megatron_vocagno import dryrun

    try:
        found = dryrun.answer(arguments)
    except dryrun.USER_ERRORS as error:
        return _refuse(SharedError(str(error)))
    if _is_first():
        print(found, end="")
    return 0


def _train(run: Run, settings: Path, stopper: Stopper) -> Exception | None:
    """Returns what the user has to mend."""
    # after what needs no more than the run file: DeepSpeed takes seconds to import, and talks while it does
    from megatron_vocagno.train import USER_ERRORS, start_training

    try:
        start_training(run, settings, stopper)
    except USER_ERRORS as error:
        return error
    return None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    # no abbreviations: `--dry` must not train
    parser = argparse.ArgumentParser(description="Pretrain a student under the guidance of a teacher.", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run file, TOML")
    parser.add_argument("--deepspeed_config", type=Path, help="batch sizes, precision, optimizer and ZeRO stage, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the run file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run as JSON and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that needs no data, weights or GPU, and stop; with the options of python -m megatron_vocagno.plan",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it; LOCAL_RANK says the same
    return parser.parse_args(arguments)


def _refuse(error: Exception) -> int:
    if not _is_first():
        # the first rank says the same, and the launcher then ends this one: one message, not one a rank
        time.sleep(PATIENCE)
    if _is_first() or not isinstance(error, SharedError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, OccupiedError) else 2


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
