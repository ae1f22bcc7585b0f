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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_vocagno.command import Parser, add_verbosity, is_first_rank, refuse, run_command
from megatron_vocagno.config import Run
from megatron_vocagno.errors import RunError, SharedError, UserError
from megatron_vocagno.planning.options import add_plan_options
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.stop_signal import StopSignal

# help speaks of what was started: the installed module, or the repository's script by the path that it was given
SCRIPT = "examples/pretrain_vocagno.py"
LAUNCHED, ALONE = (
    ("--module megatron_vocagno.pretrain", "-m megatron_vocagno.pretrain")
    if __name__ == "__main__"
    else (sys.argv[0] if sys.argv[0].endswith(SCRIPT) else SCRIPT,) * 2
)
PROG = f"deepspeed {LAUNCHED}"
EXAMPLE = f"""deepspeed --num_gpus 2 {LAUNCHED} examples/quickstart.toml \\
    --deepspeed_config ds_configs/cpu_pp2.json --set training.steps=10"""
EXIT_CODES = (
    "0 the last step is done, or it was asked to leave and has saved (SIGTERM, SIGUSR1, training.max_minutes); "
    "1 another run is at work in its folder; 2 something for you to mend; 130 Ctrl-C"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--dry-run" in arguments:
        options = dry_run_parser().parse_args(arguments)
        return run_command(lambda: _dry_run(options))
    options = parser().parse_args(arguments)
    # an OSError may pass by itself, so it is no matter of the user's: supervisors start such a run again
    after_interrupt = "the same command goes on from the newest whole checkpoint, if there is one"
    return run_command(lambda: _pretrain(options), after_interrupt, (UserError,))


def leave(code: int) -> NoReturn:
    """Ends this process. A run that failed has left threads of its process group behind: they would turn its exit code into that
    of an abort when the interpreter tidies up, so that is not waited for."""
    if code == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _pretrain(options: argparse.Namespace) -> int:
    try:
        run = load_run(options.run, options.set)
        if options.print_config:
            print(run.model_dump_json(indent=2))
            return 0
        if options.deepspeed_config is None:
            raise RunError("--deepspeed_config is missing: it owns batch sizes, precision and the optimizer (see ds_configs/)")
    except RunError as error:
        if options.print_config or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return _refuse_together(error)
    # listening comes first: a signal while DeepSpeed is imported, or the teacher is read, must not end the process
    with StopSignal(run.training.max_minutes) as stop_signal:
        problem = _train(run, options, stop_signal)
    return 0 if problem is None else refuse(problem, all_ranks_say_the_same=isinstance(problem, SharedError))


def _refuse_together(error: RunError) -> int:
    """Other ranks may have read files without this mistake, and would wait for this one."""
    from megatron_vocagno.training.loop import share_error

    if is_first_rank():
        code = refuse(error)  # at once: the others may not be there yet
        share_error(error)
        return code
    share_error(error)
    return refuse(error, all_ranks_say_the_same=True)


def _train(run: Run, options: argparse.Namespace, stop_signal: StopSignal) -> UserError | None:
    """Returns what the user has to mend."""
    # after what needs no more than the run file: DeepSpeed takes seconds to import
    from megatron_vocagno.engine.processes import show_deepspeed_log
    from megatron_vocagno.training.loop import start_training

    if options.verbose and is_first_rank():
        show_deepspeed_log()
    try:
        start_training(run, options.deepspeed_config, stop_signal, options.quiet)
    except UserError as error:
        return error
    return None


def _dry_run(options: argparse.Namespace) -> int:
    """Under a launcher each rank finds the same: the first one says it."""
    from megatron_vocagno.planning.dry_run import dry_run

    try:
        found, code = dry_run(options)
    except UserError as error:
        return refuse(error, all_ranks_say_the_same=True)
    if is_first_rank():
        print(found, end="")
    return code


def parser() -> Parser:
    parser = Parser(
        PROG,
        "RUN.toml --deepspeed_config FILE",
        "Pretrain a student under the guidance of a teacher. Started again, it goes on from its newest checkpoint.",
        EXAMPLE,
        EXIT_CODES,
    )
    parser.add_argument("run", type=Path, metavar="RUN.toml", help="the run file")
    parser.add_argument(
        "--deepspeed_config", type=Path, metavar="FILE", help="batch sizes, precision, optimizer and ZeRO stage, JSON (required)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the run file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run as JSON and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that needs no data, weights or GPU, and stop: --dry-run --help"
    )
    add_verbosity(parser, "DeepSpeed's log lines too, of the first rank")
    _add_launchers_word(parser)
    return parser


def dry_run_parser() -> Parser:
    """The options of the plan belong to a dry run."""
    parser = Parser(
        f"python {ALONE}",
        "RUN.toml --dry-run --deepspeed_config FILE --gpus N",
        "Check what needs no data, weights or GPU, and plan the run.",
        f"python {ALONE} examples/recipes/qwen2.5-math-instruct.toml --dry-run \\\n"
        "    --deepspeed_config ds_configs/gpu_zero1_bf16.json --gpus 32 \\\n"
        "    --student-config examples/plan/TinyLlama-1.1B.json \\\n"
        "    --teacher-config examples/plan/Qwen2.5-Math-7B.json",
    )
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # that it is one is known by now
    add_plan_options(parser)
    _add_launchers_word(parser)
    return parser


def _add_launchers_word(parser: Parser) -> None:
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it; LOCAL_RANK says the same


if __name__ == "__main__":
    leave(main())
