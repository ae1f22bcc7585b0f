"""Measure the start of commands and of a resumed run, in CPU time.

    python -m benchmarks.startup [--write]     the table; --write puts it into docs/performance.md
    python -m benchmarks.startup --quick       one round: checks that it runs

| what                                                          | goal                            |
|---------------------------------------------------------------|---------------------------------|
| `import megatron_vocagno.objective`, relative to `import torch` | ≤ 1.2 ×                       |
| the `--help` of each command                                  | ≤ 0.3 s                         |
| `make demo`, if its results exist                             | ≤ 5 s                           |
| a resumed run, until its first step has ended, by parts       |                                 |

All arms take turns, each in new processes, with files in the page cache. A figure is the median of the rounds. `make demo` is
left out if `.demo` is not complete. The resumed run has one process, and a student and a teacher with a thousand
tokens: it has the parts of a start that do not depend on the size of the models. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.page import GOALS, PAGE, Figure, circumstances, markdown, show, write_section
from megatron_vocagno.command import Parser, run_command
from tests.runs import REPOSITORY, SCRIPT, build_small_case, environment

COMMANDS = {
    name: ["-m", name]
    for name in (
        *("megatron_vocagno.plan", "megatron_vocagno.export", "megatron_vocagno.pretrain", "tools.preprocess.build_dataset"),
        *("tools.preprocess.score_teacher", "tools.preprocess.report", "tools.preprocess.show_document"),
        "tools.convert.gguf_to_safetensors",
    )
} | {SCRIPT: [SCRIPT]}
IMPORTS = {"torch": ["-c", "import torch"], "objective": ["-c", "import megatron_vocagno.objective"]}
ROUNDS = 5

RESUME = """
import json, os, sys
def cpu():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
seconds, last = {}, 0.0
def end(part):
    global last
    now = cpu()
    seconds[part] = seconds.get(part, 0.0) + now - last
    last = now
from megatron_vocagno.command import imports_for_good
with imports_for_good():
    import torch, torch._dynamo
    end("torch")
    import transformers.modeling_layers
    end("transformers")
    import deepspeed
    end("DeepSpeed")
    from megatron_vocagno import pretrain
    from megatron_vocagno.engine.checkpoint import CheckpointManager
    from megatron_vocagno.training import loop, setup
    end("this package")
def timed(owner, name, part):
    function = getattr(owner, name)
    def call(*arguments, **named):
        end("the rest")
        result = function(*arguments, **named)
        end(part)
        if part == "the first step":
            print(json.dumps(seconds))
            sys.stdout.flush()
            os._exit(0)
        return result
    setattr(owner, name, call)
timed(loop, "start", "the process group")
timed(setup, "_open_files", "datasets and student files")
timed(setup, "load_teacher", "the teacher")
timed(setup, "build_engine", "the engine")
timed(CheckpointManager, "resume", "the checkpoint")
timed(loop, "take_step", "the first step")
pretrain.main(sys.argv[1:])
"""
"""The training command, which ends after its first step and prints the CPU seconds of its parts."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.startup",
        "",
        "Measure the start of commands and of a resumed run, in CPU time.",
        "python -m benchmarks.startup --write",
        GOALS,
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="one round: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    rounds = 1 if args.quick else ROUNDS
    figures = [*imports_and_helps(rounds), *demo(), *resume(rounds)]
    show(figures)
    if args.write:
        head = f"`python -m benchmarks.startup`, {circumstances('torch', 'transformers', 'deepspeed')}"
        write_section("startup", f"{head}\n\n{markdown(figures)}", PAGE)
    return int(any(figure.met is False for figure in figures))


def imports_and_helps(rounds: int) -> list[Figure]:
    arms = IMPORTS | {name: [*words, "--help"] for name, words in COMMANDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, words in arms.items():
            measured = cpu_seconds(words)
            if number:  # the first round fills the page cache
                seconds[name].append(measured)
    medians = {name: median(values) for name, values in seconds.items()}
    ratio = median(ours / torch for ours, torch in zip(seconds["objective"], seconds["torch"], strict=True))
    slowest = max(COMMANDS, key=lambda name: medians[name])
    return [
        Figure(
            "`import megatron_vocagno.objective`, relative to `import torch`",
            f"{ratio:.2f} × ({medians['objective']:.2f} / {medians['torch']:.2f} s)",
            "≤ 1.2 ×",
            ratio <= 1.2,
        ),
        Figure(
            f"`--help`, the slowest of {len(COMMANDS)} commands",
            f"{medians[slowest]:.2f} s (`{slowest}`)",
            "≤ 0.3 s",
            medians[slowest] <= 0.3,
        ),
    ]


def cpu_seconds(words: Sequence[str]) -> float:
    """CPU time of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def demo() -> list[Figure]:
    if not (REPOSITORY / ".demo" / "run" / "finished").exists():
        return []
    seconds = [cpu_seconds(["examples/demo/story.py"]) for _ in range(2)][-1]  # the first run may write a result
    return [Figure("`make demo`, if its results exist", f"{seconds:.1f} s", "≤ 5 s", seconds <= 5)]


def resume(rounds: int) -> list[Figure]:
    """The parts of a resume, and their sum."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        case = build_small_case(Path(folder))
        arguments = case.command("run", ["eval.rows=2"])
        words = [sys.executable, SCRIPT, *arguments]
        subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, check=True)
        words = [sys.executable, "-c", RESUME, *arguments, "--set", "training.steps=6"]
        for _ in range(rounds):
            told = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True).stdout
            assert "resuming after step 5" in told
            found.append(json.loads(told.splitlines()[-1]))
    total = median(sum(parts.values()) for parts in found)
    medians = {part: median(parts[part] for parts in found) for part in found[0]}
    label = "a resumed small run, until its first step has ended"
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in medians.items())
    return [Figure(label, f"{total:.1f} s"), Figure("its parts", f"{parts} s")]


if __name__ == "__main__":
    sys.exit(main())
