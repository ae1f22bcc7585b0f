"""The wheel: what is in it, what it says of itself, and that its commands run where there is no repository."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import megatron_vocagno
from megatron_vocagno.errors import SCRIPTS
from tests.runs import REPOSITORY

pytestmark = pytest.mark.slow
INFO = f"megatron_vocagno-{megatron_vocagno.__version__}.dist-info"
PACKAGES = ("megatron_vocagno", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the build system's own call, from a copy: a build writes beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*PACKAGES, "tests/release", "examples/plan"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "examples/__init__.py").touch()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").iterdir()
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{INFO}/METADATA"))


def in_wheel(path: Path) -> str:
    """Where a file of the repository lies in the wheel."""
    place = path.relative_to(REPOSITORY).as_posix()
    return f"megatron_vocagno/{place}" if place.startswith("tools/") else place


def test_the_wheel_holds_every_file_of_the_package_and_the_tools_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*") if path.is_file()]
    expected = {in_wheel(path) for path in files if "__pycache__" not in path.parts}
    assert {name for name in wheel.namelist() if not name.startswith(INFO)} == expected
    assert {"megatron_vocagno/py.typed", "megatron_vocagno/tools/preprocess/templates/report.html"} < expected
    assert len(expected) > 90


def test_it_adds_one_package_and_the_commands(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"megatron_vocagno", INFO}
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{INFO}/entry_points.txt").decode())
    tools = {name: f"megatron_vocagno.tools.{tool}:main" for tool, name in SCRIPTS.items()}
    commands = {"vocagno-pretrain": "megatron_vocagno.pretrain:script"}
    commands |= {f"vocagno-{name}": f"megatron_vocagno.{name}:main" for name in ("plan", "export")}
    assert dict(scripts["console_scripts"]) == tools | commands


def test_it_says_its_version_its_license_and_its_python(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Version"] == megatron_vocagno.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read(f"{INFO}/licenses/{metadata['License-File']}") == (REPOSITORY / "LICENSE").read_bytes()
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize(
    ("module", "function", "command", "shown"),
    [
        ("megatron_vocagno.pretrain", "script", "vocagno-pretrain", "deepspeed --module megatron_vocagno.pretrain"),
        ("megatron_vocagno.plan", "main", "vocagno-plan", "vocagno-plan"),
        ("megatron_vocagno.tools.preprocess.build_dataset", "main", "vocagno-build", "vocagno-build"),
    ],
)
def test_a_command_runs_from_anywhere_and_calls_itself_by_its_installed_name(
    unpacked: Path, tmp_path: Path, module: str, function: str, command: str, shown: str
) -> None:
    """As the script that pip writes for it does."""
    script = tmp_path / command
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    found = subprocess.run(
        [sys.executable, str(script), "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"usage: {shown} " in found.stdout
    assert not re.search(r"(-m|--module) tools|pretrain_vocagno", found.stdout)


def test_a_page_of_the_tools_finds_its_templates_in_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = "from megatron_vocagno.tools.preprocess import heat; print(*heat.TEMPLATES.glob('*.html'))"
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.split()[0]).is_relative_to(unpacked)
