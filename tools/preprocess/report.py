"""Makes one self-contained HTML page about a dataset, or about the sample rows of a run. The page needs no network.

    python -m tools.preprocess.report data/train --out report.html
    python -m tools.preprocess.report --run RUN_DIR --out heat.html

The second command shows the sample rows of a run with logging.samples, see heat.py. For the first one, see report_page.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vocagno.command import Parser, positive_int, run_command
from megatron_vocagno.errors import tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parse(argv)
    return run_command(lambda: report(args))


def report(args: argparse.Namespace) -> None:
    # imported after the options were checked, because these imports take half a second
    from megatron_vocagno.corpus.dataset import AlignedDataset

    from . import heat
    from .report_page import page

    if args.run is not None:
        html = heat.page(args.run, args.data)
    else:
        html = page(AlignedDataset.open(args.dataset), args.sample, args.seed, args.row_length)
    args.out.write_text(html, encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    prog = tool("preprocess.report")
    parser = Parser(
        prog,
        "(DATASET | --run RUN_DIR) --out PAGE.html",
        "Make an HTML page about a dataset, or about the sample rows of a run. The page needs no network.",
        f"{prog} data/mine --out report.html\n{prog} --run runs/mine --out heat.html",
    )
    about = parser.add_mutually_exclusive_group(required=True)
    about.add_argument("dataset", nargs="?", metavar="DATASET", help="folder of the dataset")
    about.add_argument("--run", type=Path, metavar="RUN_DIR", help="output folder of a run with logging.samples")
    parser.add_argument(
        "--data", type=Path, metavar="DATASET", help="with --run: the dataset of its data.valid (default: at the recorded path)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="PAGE.html", help="the page (required)")
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=1000,
        metavar="N",
        help="number of documents whose rows are measured (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sample of documents (default: 0)")
    parser.add_argument(
        "--row-length", type=row_length, default=2048, metavar="N", help="student positions per row (default: 2048)"
    )
    args = parser.parse_args(argv)
    if args.run is None and args.data is not None:
        parser.error("--data is only for --run: give the dataset as an argument")
    measures = ("sample", "seed", "row_length")
    if args.run is not None and any(getattr(args, name) != parser.get_default(name) for name in measures):
        parser.error("--sample, --seed and --row-length are only for a dataset: with --run nothing is sampled")
    return args


def row_length(text: str) -> int:
    from megatron_vocagno.batch.pack import SLACK

    if positive_int(text) <= 2 * SLACK:
        raise argparse.ArgumentTypeError(f"{text} is too short: at least {2 * SLACK + 1}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
