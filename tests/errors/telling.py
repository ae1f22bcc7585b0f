"""How a message is tested: what a block raises, in exactly these words."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from megatron_vocagno.errors import HubError, UserError


@contextmanager
def told(message: str, *, after: str = "", **names: object) -> Iterator[None]:
    """The block raises a user's error with the text `after` and then `message`. Each of `names` stands for its value in them."""
    with pytest.raises((UserError, HubError)) as refusal:
        yield
    text = readable(str(refusal.value), names)
    assert text.startswith(after)
    assert text.removeprefix(after) == message


def readable(text: str, names: dict[str, object]) -> str:
    # the longest first: one path may lie within another
    for name, value in sorted(names.items(), key=lambda named: -len(str(named[1]))):
        text = text.replace(str(value), name)
    return text


def refused(command: Callable[[Sequence[str]], int], *arguments: object) -> None:
    """Raises what a command that was refused has told, on standard error, as an error of the user's."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        try:
            code: object = command([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
    assert code == 2
    *notes, message = re.split("^error: ", errors.getvalue(), flags=re.MULTILINE)
    assert len(notes) == 1, "one message, not several"
    raise UserError(message.strip())
