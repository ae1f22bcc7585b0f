"""The plan command: memory, time and cost of a run on a given number of GPUs.

    python -m megatron_vocagno.plan RUN.toml --deepspeed_config ds_configs/X.json --gpus 32 --gpu h100

Reads the run's files and the config.json of both models, but no weights. docs/clusters.md explains the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vocagno.command import Parser, run_command, started_as
from megatron_vocagno.planning.options import add_plan_options

EXAMPLE = """run.toml --deepspeed_config ds_config.json --gpus 32 --gpu h100 \\
    --student-config student/config.json --teacher-config teacher/config.json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: _print_plan(options))


def _print_plan(options: argparse.Namespace) -> None:
    # not at the top: torch takes seconds to import, and a wrong option should fail at once
    from megatron_vocagno.planning.request import plan

    print(plan(options), end="")


def parser() -> Parser:
    prog = started_as("vocagno-plan", "python -m megatron_vocagno.plan")
    parser = Parser(
        prog,
        "RUN.toml --deepspeed_config FILE --gpus N",
        "Estimate memory, time and cost of a run before you start it. Downloads nothing and reads no weights.",
        f"{prog} {EXAMPLE}",
    )
    add_plan_options(parser)
    parser.add_argument("--all", action="store_true", help="show all layouts, not only the run's own and the three best")
    parser.add_argument("--json", action="store_true", help="print all layouts as JSON, with unrounded numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
