"""What can be said of a command that is not run: its own program takes its arguments, and what it names is there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from argparse import ArgumentParser
from unittest import mock

from click import Command, Context, Group

from tests.docs.execution import execute, plain, variants
from tests.runs import REPOSITORY


def resolves(text: str) -> None:
    """A training command whose run file is whole, overrides and all, and whose DeepSpeed configuration is there."""
    execute(text + " --print-config", REPOSITORY)
    words = shlex.split(text)
    _are_there([words[words.index("--deepspeed_config") + 1]])


def prints_help(text: str) -> None:
    """A command without its arguments."""
    execute(text + " --help", REPOSITORY)


def make_has(text: str) -> None:
    ended = subprocess.run(
        ["make", "--dry-run", *shlex.split(text)[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and ended.stdout, ended.stderr


def pip_finds(text: str) -> None:
    """The extras and files that it names are there."""
    words = shlex.split(text.partition("pip install ")[2])
    setup = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    [tables] = [node.value for node in ast.walk(setup) if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    assert isinstance(tables, ast.Dict)
    extras = {ast.literal_eval(key) for key in tables.keys if key is not None}
    for named in re.findall(r"(?:megatron-vocagno|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(named.split(",")) <= extras, f"setup.py has no extra {named}"
    files = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-r", "--requirement")]
    _are_there(files)


def names_files(text: str) -> None:
    """The files and folders that are its first words are there."""
    places = [word for word in shlex.split(text) if "/" in word]
    assert places, f"it names none: {text}"
    _are_there(places)


def is_a_script(text: str) -> None:
    """It can be started, and is whole for a shell."""
    _are_there([text])
    assert os.access(REPOSITORY / text, os.X_OK), f"{text} is not executable"
    ended = subprocess.run(["bash", "-n", text], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def shell_reads(text: str) -> None:
    """It is whole for a shell; that is all that can be said of it."""
    ended = subprocess.run(["bash", "-n", "-c", plain(text)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def ray_understands(text: str) -> None:
    from ray.scripts.scripts import cli

    _understood(cli, shlex.split(re.split(" > | && ", text)[0].partition("ray ")[2]))
    files = re.findall(r"examples/\S+", text)
    _are_there(files)


def ray_knows(text: str) -> None:
    from ray.scripts.scripts import cli

    assert text.split()[1] in cli.commands, f"Ray has no command {text}"


def hf_understands(text: str) -> None:
    from huggingface_hub.cli.hf import app

    with (
        mock.patch("socket.getaddrinfo", side_effect=OSError("a test asks no network")),
        mock.patch("huggingface_hub.cli.download.snapshot_download", return_value="") as download,
    ):
        app(shlex.split(text)[1:], standalone_mode=False)
    download.assert_called_once()


def megatron_takes(text: str) -> None:
    """The script is there, and its own flags have these values. Megatron-LM's own flags are its own."""
    from megatron_vocagno.integrations.megatron.arguments import add_arguments, rule_of

    words = shlex.split(text)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    _are_there([words[script]])
    rule_of(add_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(words[script + 1 :])[0])


def evaluation_takes(text: str) -> None:
    """It reads all of its options before it looks for the folder, which is not there."""
    for variant in variants(re.sub(r"\[OUT\] |\|[^]]*", "", text)):
        command = ["bash", "-c", f"'{REPOSITORY}'/{variant}"]
        ended = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert "there is no folder" in ended.stderr, f"{variant}: {ended.stderr}"


def _are_there(names: list[str]) -> None:
    missing = [name for name in names if not (REPOSITORY / name).exists()]
    assert not missing, f"not in the repository: {missing}"


def _understood(command: Command, words: list[str], parent: Context | None = None) -> None:
    """Parsed as far as the last command of its groups, and not run."""
    context = command.make_context(command.name, list(words), parent=parent)
    if isinstance(command, Group):
        name, below, rest = command.resolve_command(context, context._protected_args + context.args)
        assert below is not None, f"no command {name}"
        _understood(below, rest, context)
