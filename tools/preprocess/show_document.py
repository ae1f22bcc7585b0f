"""Shows one document of a dataset in the terminal: the student's tokens above, the teacher's tokens below, aligned by character.

    python -m tools.preprocess.show_document data/train 17
    python -m tools.preprocess.show_document data/train --random --start 100 --stop 300

The teacher tokens below a student token are those that it maps to. A student token and the teacher tokens below it have the same
color. A teacher token that several student tokens share is underlined.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.errors import tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: show_document(args))


def show_document(args: argparse.Namespace) -> None:
    # imported after the options were checked, because these imports take half a second
    from megatron_vocagno.corpus.dataset import AlignedDataset

    from .colored_lines import chosen, shown
    from .console import Terminal
    from .interlinear import Interlinear

    console = Terminal(highlight=False)
    dataset = AlignedDataset.open(args.dataset)
    document = chosen(dataset, args.index or 0, args.id, args.random)
    for line in shown(Interlinear(dataset), document, args.start, args.stop, console.width):
        console.print(line, soft_wrap=True)


def parser() -> Parser:
    prog = tool("preprocess.show_document")
    parser = Parser(
        prog,
        "DATASET [INDEX]",
        "Show one document in the terminal: the student's tokens above, the teacher's tokens that cover them below.",
        f"{prog} data/mine 17\n{prog} data/mine --random --start 100 --stop 300",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of the dataset")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("index", nargs="?", type=number, metavar="INDEX", help="number of the document (default: 0)")
    which.add_argument("--id", help="id of the document, in a dataset that was built with --id-key")
    which.add_argument("--random", action="store_true", help="a random document; the first line shows its number")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first student token (default: 0)")
    parser.add_argument("--stop", type=int, metavar="N", help="student token after the last (default: the end)")
    return parser


def number(text: str) -> int:
    """A type for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a document number, not {text!r}; to search by id, use --id {text}") from None


if __name__ == "__main__":
    sys.exit(main())
