"""The command `python -m examples.evidence`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.evidence import learning_rates, report
from examples.evidence.running import EXPERIMENTS, Options, collect, experiment, run_all, write_results
from megatron_vocagno.command import Parser, positive_int, run_command

ACTIONS = ("prepare", "run", "tune", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options, actions, names, results = _parse(arguments)
    advice = "finished runs are kept: run the same command again to resume"
    return run_command(lambda: everything(options, actions, names, results), advice)


def everything(options: Options, actions: Sequence[str], names: Sequence[str], results: Path | None = None) -> None:
    """Raises JobFailed, NoResults."""
    for name in names:
        act(name, actions, options)
    if "report" in actions:
        # the results of a quick run are not for publication
        page = options.root / report.PAGE.name if options.quick else report.PAGE
        without = report.write(results or options.root / "results", page)
        print(f"written: {page}")
        for path in without:
            print(f"no findings are written for these results: add them as {path}")


def act(name: str, actions: Sequence[str], options: Options) -> None:
    """Prepare, tune and run one experiment."""
    chosen = experiment(name)
    if "tune" in actions:
        specs = chosen.tuning(options)
        chosen.prepare(specs, options)
        run_all(specs, options)
        edges = learning_rates.choose(name, collect(specs, options.root), chosen.JUDGE, chosen.HIGHER_IS_BETTER)
        if edges:
            print(f"note: the best learning rate of {', '.join(edges)} is the lowest or the highest of those that were tried")
    specs = chosen.runs(options) if {"prepare", "run"} & set(actions) else []
    if specs:
        chosen.prepare(specs, options)
    if "run" in actions:
        run_all(specs, options)
        write_results(name, specs, options)


def _parse(arguments: Sequence[str] | None) -> tuple[Options, Sequence[str], Sequence[str], Path | None]:
    parser = Parser(
        "python -m examples.evidence",
        "[WHAT]...",
        "Run small experiments on when the guidance helps and which of its choices matter. Takes an hour on two cores.",
        "python -m examples.evidence --quick\npython -m examples.evidence run mechanism --seeds 3",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help=f"any of {', '.join(ACTIONS)}, {', '.join(EXPERIMENTS)} (default: all but tune and {EXPERIMENTS[-1]})",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="seeds of the main arms (default: 3)")
    parser.add_argument("--quick", action="store_true", help="few steps and arms, to check that everything runs")
    parser.add_argument("--workers", type=positive_int, default=2, metavar="N", help="parallel runs, one core each (default: 2)")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(".evidence"),
        metavar="DIR",
        help="folder of data, runs and results (default: .evidence)",
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="results to report (default: those in --root)")
    options = parser.parse_args(arguments)
    for word in options.what:
        if word not in (*ACTIONS, *EXPERIMENTS):
            parser.error(f"{word!r} is not one of {', '.join((*ACTIONS, *EXPERIMENTS))}")
    actions = [word for word in ACTIONS if word in options.what] or [word for word in ACTIONS if word != "tune"]
    names = [word for word in EXPERIMENTS if word in options.what] or EXPERIMENTS[:-1]
    return Options(options.root, options.seeds, options.quick, options.workers), actions, names, options.results


if __name__ == "__main__":
    sys.exit(main())
