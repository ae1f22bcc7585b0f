"""The option for a part of a job array. Imports nothing slow, so that --help is printed at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_vocagno.errors import CorpusError

if TYPE_CHECKING:
    from megatron_vocagno.preprocess.plan import Slice


def slice_of(text: str) -> Slice:
    """A type for argparse: "2/8" is the second of eight parts."""
    from megatron_vocagno.preprocess.plan import Slice

    i, _, n = text.partition("/")
    try:
        return Slice(int(i), int(n))
    except (ValueError, CorpusError):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N with I from 1 to N") from None
