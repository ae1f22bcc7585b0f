"""The training command. Reads the run file, then trains.

    deepspeed examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json [--set a.b=c]
    python examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json --dry-run --gpus 32

Exit codes: 0 if the run has finished its last step, or has saved a checkpoint after a stop request (SIGTERM, SIGUSR1,
training.max_minutes). 1 if another run is using the output folder. 2 if there is an error that the user can fix, as described in
the message. 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_vocagno.command import Parser, add_verbosity, imports_for_good, is_rank0, report_error, run_command, started_as
from megatron_vocagno.errors import RunError, SharedError, UserError
from megatron_vocagno.planning.options import add_plan_options
from megatron_vocagno.training.stop_signal import StopSignal

if TYPE_CHECKING:
    from megatron_vocagno.config import Run

# the help names the command that was started: the installed module, or the repository's script by its path
SCRIPT = "examples/pretrain_vocagno.py"
LAUNCHED, SINGLE = (
    ("--module megatron_vocagno.pretrain", "-m megatron_vocagno.pretrain")
    if __name__ == "__main__" or Path(sys.argv[0]).name == "vocagno-pretrain"
    else (sys.argv[0] if sys.argv[0].endswith(SCRIPT) else SCRIPT,) * 2
)
PROG = f"deepspeed {LAUNCHED}"
DRY_RUN = started_as("vocagno-pretrain", f"python {SINGLE}")
EXAMPLE = f"""deepspeed --num_gpus 2 {LAUNCHED} run.toml \\
    --deepspeed_config ds_config.json --set training.steps=10"""
EXIT_CODES = (
    "0 finished, or stopped on request and saved (SIGTERM, SIGUSR1, training.max_minutes), "
    "1 another run is using the output folder, 2 an error that you can fix, 130 Ctrl-C"
)


EXIT_CODE_FILE = "MEGATRON_VOCAGNO_EXIT_CODE_FILE"
"""A variable with the path of a file, for a supervisor: torchrun ends with 1, whatever the exit codes of its ranks are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--dry-run" in arguments:
        options = dry_run_parser().parse_args(arguments)
        return run_command(lambda: _dry_run(options))
    options = parser().parse_args(arguments)
    # not OSError: its cause may disappear without the user, so it ends with a traceback and supervisors start the run again
    after_interrupt = "run the same command again to resume from the newest complete checkpoint, if there is one"
    return run_command(lambda: _pretrain(options), after_interrupt, (UserError,))


def run_process(command: Callable[[], int]) -> NoReturn:
    """Run the command, and end this process with its exit code."""
    try:
        code = command()
    except SystemExit as error:  # wrong options, or the end of a help
        code = error.code if isinstance(error.code, int) else 0
    exit_process(code)


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code. A failed run leaves threads of its process group behind. They would abort the process
    while the interpreter shuts down, and so change the exit code. After a failure the shutdown is therefore skipped.

    The exit code 2 is also written to the file that the variable `EXIT_CODE_FILE` names.
    """
    if code == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 2 and (file := os.environ.get(EXIT_CODE_FILE)):
        with suppress(OSError):  # the error itself was printed
            Path(file).write_text(f"{code}\n")
    os._exit(code)


def _pretrain(options: argparse.Namespace) -> int:
    from megatron_vocagno.run_file import load_run

    try:
        run = load_run(options.run, options.set)
        if options.print_config:
            print(run.model_dump_json(indent=2))
            return 0
        if options.deepspeed_config is None:
            raise RunError(
                "--deepspeed_config is missing: it sets batch sizes, precision and the optimizer "
                "(see ds_configs/ in the repository)"
            )
    except RunError as error:
        if options.print_config or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return _report_to_all_ranks(error)
    # first install the signal handlers: a signal must not end the process while DeepSpeed is imported or the teacher is loaded
    with StopSignal(run.training.max_minutes) as stop_signal:
        problem = _train(run, options, stop_signal)
    return 0 if problem is None else report_error(problem, same_on_all_ranks=isinstance(problem, SharedError))


def _report_to_all_ranks(error: RunError) -> int:
    """Report an error in the run file on all ranks. Other ranks may have read files without this error, and would wait."""
    from megatron_vocagno.training.loop import share_error

    if is_rank0():
        code = report_error(error)  # print first, because the other ranks may not have started yet
        share_error(error)
        return code
    share_error(error)
    return report_error(error, same_on_all_ranks=True)


def _train(run: Run, options: argparse.Namespace, stop_signal: StopSignal) -> UserError | None:
    """Train, and return the error that the user can fix, if there is one."""
    # imported after the run file was checked, because DeepSpeed takes seconds to import
    # once in a process: a freeze would also keep the garbage of an earlier run
    with nullcontext() if "deepspeed" in sys.modules else imports_for_good():
        from megatron_vocagno.engine.processes import show_deepspeed_log
        from megatron_vocagno.training.loop import start_training

    if options.verbose and is_rank0():
        show_deepspeed_log()
    try:
        start_training(run, options.deepspeed_config, stop_signal, options.quiet)
    except UserError as error:
        return error
    return None


def _dry_run(options: argparse.Namespace) -> int:
    """Under a launcher, all ranks have the same findings, and rank 0 prints them."""
    # while DeepSpeed is imported, it warns that this machine has no GPU, and a dry run needs none
    log = logging.getLogger("DeepSpeed")
    log.disabled = True
    from megatron_vocagno.planning.dry_run import dry_run

    log.disabled = False
    try:
        found, code = dry_run(options)
    except UserError as error:
        return report_error(error, same_on_all_ranks=True)
    if is_rank0():
        print(found, end="")
    return code


def parser() -> Parser:
    parser = Parser(
        PROG,
        "RUN.toml --deepspeed_config FILE",
        "Pretrain a student under the guidance of a teacher. If you start it again, it resumes from its newest checkpoint.",
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
        "--dry-run", action="store_true", help="check everything that needs no data, weights or GPU, and stop: --dry-run --help"
    )
    add_verbosity(parser, "DeepSpeed's log lines too, on rank 0")
    _add_local_rank(parser)
    return parser


def dry_run_parser() -> Parser:
    """The options of the plan belong to a dry run."""
    parser = Parser(
        f"{DRY_RUN} --dry-run",
        "RUN.toml --deepspeed_config FILE --gpus N",
        "Check what needs no data, weights or GPU, and plan the run.",
        f"{DRY_RUN} --dry-run run.toml \\\n"
        "    --deepspeed_config ds_config.json --gpus 32 \\\n"
        "    --student-config student/config.json --teacher-config teacher/config.json",
    )
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # already given
    add_plan_options(parser)
    _add_local_rank(parser)
    return parser


def _add_local_rank(parser: Parser) -> None:
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers pass it; LOCAL_RANK is read instead


def script() -> NoReturn:
    """The command `vocagno-pretrain`: a dry run, or a run of one process."""
    run_process(main)


if __name__ == "__main__":
    run_process(main)
