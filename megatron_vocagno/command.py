"""What all commands share: their help, their options, how they end. The standard library alone, so that help comes at once.

    def main(arguments: Sequence[str] | None = None) -> int:
        options = parser().parse_args(arguments)
        return run_command(lambda: work(options), "what is finished stays; the same command goes on from there")

docs/reference.md tells users what holds for all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import NoReturn

from megatron_vocagno import __version__
from megatron_vocagno.errors import UserError

EXIT_CODES = "0 done; 2 something for you to mend; 130 Ctrl-C"
INTERRUPTED, NOBODY_READS = 130, 141
"""As a shell has them: 128 and the number of SIGINT, of SIGPIPE."""
COLUMNS = 100
PATIENCE = 5.0
"""Seconds that a rank waits before it ends over an error that the first rank has most likely met too."""


class Parser(argparse.ArgumentParser):
    """Help that fits a screen: usage, what it does, an example, options, exit codes. Under a launcher the first rank speaks."""

    def __init__(self, prog: str, arguments: str, about: str, example: str, exit_codes: str = EXIT_CODES) -> None:
        """prog, arguments: what a user types, without the options that may be left out. example: one command a line."""
        super().__init__(
            prog=prog,
            usage=textwrap.fill(f"{prog} {arguments} [options]", COLUMNS - len("usage: "), subsequent_indent=" " * 7),
            description="\n".join([_filled(about), "", "example:", *(f"  {line}" for line in example.splitlines())]),
            epilog=_filled(f"exit codes: {exit_codes}"),
            formatter_class=_Formatter,
            allow_abbrev=False,  # `--dry` must not train
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # who reads this knows it
        self.add_argument("--version", action="version", version=__version__, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n{self.format_usage()}more: {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status and not is_first_rank():
            time.sleep(PATIENCE)
        super().exit(status, message)

    def _print_message(self, message: str, file: object = None) -> None:
        if is_first_rank():
            super()._print_message(message, file)  # type: ignore[arg-type]


def _filled(text: str) -> str:
    return "\n".join(textwrap.fill(line, COLUMNS) for line in text.splitlines())


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(COLUMNS, shutil.get_terminal_size().columns))


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet alone, for a command that has nothing more to tell."""
    parser.add_argument("--quiet", action="store_true", help="only errors and the result")


def add_verbosity(parser: argparse.ArgumentParser, verbose: str) -> None:
    """--quiet and --verbose. verbose: what is told more."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true", help="only errors and the result")
    either.add_argument("--verbose", action="store_true", help=verbose)


# ---- values


def positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or has no end")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


# ---- how a command ends


def run_command(
    do: Callable[[], int | None],
    after_interrupt: str = "nothing was written",
    errors: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Returns the exit code: what `do` returns (None: 0), or that of an error, of Ctrl-C, of a reader that has gone.

    after_interrupt: what Ctrl-C leaves behind, and what to do. errors: those that are told in their own words alone.
    """
    try:
        code = do() or 0
        sys.stdout.flush()  # here, and not when the interpreter ends: then it would complain
        return code
    except KeyboardInterrupt:
        say_first(f"interrupted; {after_interrupt}")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _fall_silent()
        if isinstance(error, errors):
            return refuse(error)
        raise


def refuse(error: Exception, all_ranks_say_the_same: bool = False) -> int:
    """Tells an error, and returns its exit code."""
    if not is_first_rank():
        # the first rank says the same, and the launcher then ends this one: one message, not one a rank
        time.sleep(PATIENCE)
    if is_first_rank() or not all_ranks_say_the_same:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, UserError) else 2


def say_first(text: str) -> None:
    """A line on the error stream, of the first rank alone."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    """Of those that a launcher has started; without one, there is no other."""
    return os.environ.get("RANK", "0") == "0"


def _nobody_reads() -> bool:
    """Whether the pipe that is written to is closed, rather than a connection to some server."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fall_silent() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered still has to go somewhere
    return NOBODY_READS


def duration(seconds: float) -> str:
    """For people, the two largest of days, hours, minutes and seconds: 4d03h, 1h12m, 3m20s, 45s."""
    whole = round(seconds)
    for above, below, size, part in (("d", "h", 86_400, 3_600), ("h", "m", 3_600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{above}{whole % size // part:02}{below}"
    return f"{whole}s"
