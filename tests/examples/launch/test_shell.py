"""Every launch script is clean for shellcheck, and told in docs/clusters.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runs import REPOSITORY

LAUNCH = REPOSITORY / "examples" / "launch"


def shellcheck(*files: Path) -> str:
    """What it finds, down to matters of style."""
    command = [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "--severity=style", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_shellcheck_finds_nothing() -> None:
    scripts = [path for path in sorted(LAUNCH.rglob("*")) if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 4
    assert shellcheck(*scripts) == ""


def test_shellcheck_would_find_an_unquoted_path(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text("#!/usr/bin/env bash\nout=$1\nrm -r $out\n")
    assert "SC2086" in shellcheck(script)


def test_scripts_that_are_called_by_path_can_be() -> None:
    for script in LAUNCH.glob("*.sh"):
        assert os.access(script, os.X_OK), f"{script} is not executable"


def test_every_file_is_told() -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    for file in LAUNCH.rglob("*"):
        assert file.is_dir() or f"examples/launch/{file.relative_to(LAUNCH)}" in page, f"{file} is not in docs/clusters.md"
