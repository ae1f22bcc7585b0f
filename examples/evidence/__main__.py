"""The command. See the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.evidence import learning_rates, report
from examples.evidence.jobs import JobFailed
from examples.evidence.running import EXPERIMENTS, Options, collect, experiment, run_all, write_results

ACTIONS = ("prepare", "run", "tune", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where a job has failed, whose log's end is told, or there is nothing to report."""
    options, actions, names = _parse(arguments)
    try:
        for name in names:
            act(name, actions, options)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "report" in actions:
        # what a quick look finds is nothing to publish
        page = options.root / report.PAGE.name if options.quick else report.PAGE
        try:
            without = report.write(options.root, page)
        except report.NoResults as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"written: {page}")
        for path in without:
            print(f"no conclusions have been written of these results: {path} is where they go")
    return 0


def act(name: str, actions: Sequence[str], options: Options) -> None:
    """Of one experiment, everything but the report."""
    chosen = experiment(name)
    if "tune" in actions:
        specs = chosen.tuning(options)
        chosen.prepare(specs, options)
        run_all(specs, options)
        edges = learning_rates.choose(name, collect(specs, options.root), chosen.JUDGE, chosen.HIGHER_IS_BETTER)
        if edges:
            print(f"note: the rate of {', '.join(edges)} is the lowest or the highest that was tried")
    specs = chosen.runs(options) if {"prepare", "run"} & set(actions) else []
    if specs:
        chosen.prepare(specs, options)
    if "run" in actions:
        run_all(specs, options)
        write_results(name, specs, options)


def _parse(arguments: Sequence[str] | None) -> tuple[Options, Sequence[str], Sequence[str]]:
    parser = argparse.ArgumentParser(prog="python -m examples.evidence", description="Small experiments: what guidance does.")
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help=f"of {', '.join(ACTIONS)} and {', '.join(EXPERIMENTS)}; default: all but tune"
    )
    parser.add_argument("--seeds", type=_one_or_more, default=3, help="of the main arms (default: 3)")
    parser.add_argument("--quick", action="store_true", help="few steps and arms: to see that all of it works")
    parser.add_argument("--workers", type=_one_or_more, default=2, help="runs at a time, a core each (default: 2)")
    parser.add_argument("--root", type=Path, default=Path(".evidence"), help="where everything is made (default: .evidence)")
    options = parser.parse_args(arguments)
    for word in options.what:
        if word not in (*ACTIONS, *EXPERIMENTS):
            parser.error(f"{word!r} is none of {', '.join((*ACTIONS, *EXPERIMENTS))}")
    actions = [word for word in ACTIONS if word in options.what] or [word for word in ACTIONS if word != "tune"]
    names = [word for word in EXPERIMENTS if word in options.what] or EXPERIMENTS
    return Options(options.root, options.seeds, options.quick, options.workers), actions, names


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
