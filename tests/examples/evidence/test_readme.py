"""The page about the arms lists the preparation of each, and its command fits the training script."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

from examples.evidence.running import ARMS
from megatron_vocagno.run_file import load_run
from tests.runs import REPOSITORY

PAGE = REPOSITORY / "examples" / "evidence" / "README.md"
NAMES = sorted(path.stem for path in ARMS.glob("*.toml"))
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def arms_of(words: str) -> set[str]:
    """Arms of the row whose second column has these words."""
    [named] = [re.findall(r"`([^`]*)`", arms) for arms, needed in ROWS if words in needed]
    return {name for name in NAMES if any(fnmatch(name, pattern) for pattern in named)}


def test_each_arm_stands_where_its_file_puts_it() -> None:
    groups = [{name for name in NAMES if any(fnmatch(name, arm) for arm in re.findall(r"`([^`]*)`", row[0]))} for row in ROWS]
    assert sum(map(len, groups)) == len(NAMES) == len(set().union(*groups)) and len(ROWS) == 5
    run = {name: load_run(ARMS / f"{name}.toml", _given(name)) for name in NAMES}
    assert arms_of("do not use a teacher") == {name for name in NAMES if not run[name].guidance.needs_teacher}
    assert arms_of("no scoring") == {name for name in NAMES if run[name].guidance.distance}
    cached = arms_of("`score_teacher`, as above") | {"rho1"} | {"oracle"}
    assert cached == {name for name in NAMES if any(teacher.placement == "cached" for teacher in run[name].teacher)}
    assert all(run[name].guidance.keep == 0.4 for name in NAMES if "keep-" not in name and name != "oracle")
    assert run["rho1"].guidance == run["guided"].guidance and run["equal-parts"].guidance.equal_parts == 16


def _given(arm: str) -> tuple[str, ...]:
    online = ("teacher.path=teacher",) if arm in ("uld", "kld") else ()
    return ("data.train=data", 'student.config={model_type="llama"}', *online)


def test_the_command_loads_with_no_teacher_that_is_opened() -> None:
    [command] = re.findall(r"(?m)^deepspeed (?:.*\\\n)*.*$", PAGE.read_text(encoding="utf-8"))
    words = shlex.split(command.replace("\\\n", " "))
    arm, settings = words[words.index("examples/pretrain_vocagno.py") + 1], words[words.index("--deepspeed_config") + 1]
    run = load_run(REPOSITORY / arm, [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert (REPOSITORY / settings).is_file() and run.output == Path("runs/guided")
    [teacher] = run.teacher
    assert teacher.placement == "cached" and teacher.path is None
