"""Help, options and exit codes of all commands. Imports only the standard library, so that help is printed at once.

    def main(arguments: Sequence[str] | None = None) -> int:
        options = parser().parse_args(arguments)
        return run_command(lambda: work(options), "finished work is kept; run the same command again to continue")

docs/reference.md describes the behavior that all commands share.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import math
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_vocagno import __version__
from megatron_vocagno.errors import UserError

EXIT_CODES = "0 done, 2 an error that you can fix, 130 Ctrl-C"
INTERRUPTED, BROKEN_PIPE = 130, 141
"""The codes of a shell: 128 + SIGINT and 128 + SIGPIPE."""
TRAINING = ("torch", "deepspeed", "transformers", "accelerate", "tensorboard")
"""Packages that only the extra `train` installs."""
COLUMNS = 100
RANK0_SECONDS = 5.0
"""Seconds that another rank waits for rank 0 to print an error. The launcher ends all ranks when one of them exits."""


class Parser(argparse.ArgumentParser):
    """A parser with help that fits a screen: usage, description, example, options, exit codes. Only rank 0 prints."""

    def __init__(self, prog: str, arguments: str, about: str, example: str, exit_codes: str = EXIT_CODES) -> None:
        """
        prog        the command, as a user types it
        arguments   its arguments and required options
        about       its purpose
        example     one or more command lines
        exit_codes  the exit codes and their meanings
        """
        super().__init__(
            prog=prog,
            usage=textwrap.fill(f"{prog} {arguments} [options]", COLUMNS - len("usage: "), subsequent_indent=" " * 7),
            description="\n".join([_filled(about), "", "example:", *(f"  {line}" for line in example.splitlines())]),
            epilog=_filled(f"exit codes: {exit_codes}"),
            formatter_class=_Formatter,
            allow_abbrev=False,  # `--dry` must not train
            add_help=False,
        )
        self.given: list[str] = []
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # not needed in the help itself
        self.add_argument("--version", action="version", version=__version__, help=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        names = [word.partition("=")[0] for word in self.given if word.startswith("--") and word != "--"]
        unknown = [name for name in names if name not in self._option_string_actions]
        if unknown and message.startswith("the following arguments are required"):
            message = f"unrecognized arguments: {' '.join(unknown)}"  # a required one may be among them, misspelled
        if unknown and message.startswith("unrecognized arguments"):
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message}\n{self.format_usage()}more: {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status:
            _let_rank0_print()
        super().exit(status, message)

    def _print_message(self, message: str, file: object = None) -> None:
        if is_rank0():
            super()._print_message(message, file)  # type: ignore[arg-type]


def _filled(text: str) -> str:
    return "\n".join(textwrap.fill(line, COLUMNS) for line in text.splitlines())


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(COLUMNS, shutil.get_terminal_size().columns))


def started_as(script: str, otherwise: str) -> str:
    """The name of a command for its help: `script` if it was started by the command that an installation adds."""
    return script if Path(sys.argv[0]).name == script else otherwise


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add only --quiet, for a command without further output."""
    parser.add_argument("--quiet", action="store_true", help="only errors and the result")


def add_verbosity(parser: argparse.ArgumentParser, verbose: str) -> None:
    """Add --quiet and --verbose. verbose: the help of --verbose."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true", help="only errors and the result")
    either.add_argument("--verbose", action="store_true", help=verbose)


# ---- values


def positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


# ---- how a command ends


def run_command(
    do: Callable[[], int | None],
    after_interrupt: str = "nothing was written",
    errors: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Run `do` and return the exit code: the result of `do` (None counts as 0), or the code of an error, Ctrl-C or a closed pipe.

    after_interrupt  printed after Ctrl-C: the state of the work, and how to continue
    errors           classes of errors that are printed without a traceback
    """
    try:
        code = do() or 0
        sys.stdout.flush()  # an error here would be reported by the interpreter if it occurred at its exit
        return code
    except KeyboardInterrupt:
        if is_rank0():
            print(f"interrupted; {after_interrupt}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        extras = "train,gguf" if any(word.endswith(".gguf") for word in sys.argv) else "train"
        return report_error(UserError(f"this command needs {error.name}: pip install 'megatron-vocagno[{extras}]'"))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            # the interpreter flushes its buffer at exit, which would raise the error again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        if isinstance(error, errors):
            return report_error(error)
        raise


@contextmanager
def imports_for_good() -> Iterator[None]:
    """Import large packages without garbage collection, and exclude the imported objects from later collections.

    Almost none of these objects are garbage, and the search for it takes a fifth of the CPU time of the imports.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


def report_error(error: Exception, same_on_all_ranks: bool = False) -> int:
    """Print an error and return its exit code. same_on_all_ranks: only rank 0 prints the error."""
    _let_rank0_print()
    if is_rank0() or not same_on_all_ranks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, UserError) else 2


def is_rank0() -> bool:
    """Whether this process is rank 0 of those that a launcher has started, or was started without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def _let_rank0_print() -> None:
    """On another rank, wait: rank 0 usually has the same error, and the launcher ends this rank after rank 0 has printed it."""
    if not is_rank0():
        time.sleep(RANK0_SECONDS)


def _stdout_is_closed() -> bool:
    """Whether the reader of standard output is gone. A BrokenPipeError can also come from a connection to a server."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def duration(seconds: float) -> str:
    """A readable duration with the two largest of days, hours, minutes and seconds: 4d03h, 1h12m, 3m20s, 45s."""
    whole = round(seconds)
    for above, below, size, part in (("d", "h", 86_400, 3_600), ("h", "m", 3_600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{above}{whole % size // part:02}{below}"
    return f"{whole}s"
