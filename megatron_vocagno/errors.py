"""The errors that a user can fix, and what their messages add about a missing path.

A command prints such an error without a traceback and exits with its `exit_code`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path


class UserError(Exception):
    """An error that a user can cause and fix. The message names the operation, the place, both values and the likely cause."""

    exit_code = 2

    def __init__(self, message: str, path: str | os.PathLike[str] | None = None) -> None:
        """path: the model or dataset that is missing, so that a caller can name the option or field that it came from."""
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class RunError(UserError):
    """A run cannot start or go on: its file, an override, a path, or how its parts fit together."""


class SharedError(RunError):
    """A RunError that all ranks raise together. Only the first rank prints it."""


class RunLockedError(SharedError):
    """Another run is at work in the folder. A later start may find it free."""

    exit_code = 1


class OtherVersion(RunError):
    """A checkpoint that another release wrote."""


class ModelError(UserError):
    """A model that cannot be used as asked."""


class CorpusError(UserError):
    """An input, a tokenizer or a dataset that cannot be used as asked."""


class DatasetError(CorpusError):
    """A dataset that is missing, damaged, of another version, or made with another tokenizer than the caller needs."""


class ChangedError(CorpusError):
    """Files that were made from other input, or with other settings."""


class TokenizerError(CorpusError):
    """A tokenizer that cannot be read, or whose tokens cannot be placed in the text."""


class EncoderError(CorpusError):
    """A tokenizer that a backend cannot read."""


class EncoderMismatch(CorpusError):
    """gigatoken and Hugging Face give different ids for one text."""


class BrokenInput(Exception):
    """Why a file gives no more data: it is cut off or damaged. Callers turn it into a bad record."""


class HubError(UserError):
    """Why the Hub does not give a model. Callers add what they needed it for."""


def lfs_pointer(content: bytes) -> str:
    """What to say after the name of a file that Git LFS has not fetched; else nothing. content: its first bytes, or all."""
    if not content.startswith(b"version https://git-lfs"):
        return ""
    return "is a pointer of Git LFS, not the file that it stands for. Run `git lfs pull` in its folder."


def looked_for(path: str | os.PathLike[str]) -> str:
    """What to add to the error of a path that does not exist: the absolute path of a relative one, and a near name."""
    asked = Path(path).expanduser()
    if asked.is_absolute():
        return nearest(path)
    place = f"\n  It was looked for at {asked.resolve()}: a relative path counts from the folder that the command is run in."
    return place + nearest(path)


def nearest(path: str | os.PathLike[str]) -> str:
    """A path that is there, and differs from this one by a slip in one name; nothing where there is none."""
    asked = Path(path).expanduser()
    try:
        there = next((folder for folder in asked.parents if folder.is_dir()), Path())
        name, *rest = asked.relative_to(there).parts
        if len(Path(name).stem) < 3:  # too short to be near to anything
            return ""
        for near in difflib.get_close_matches(name, [entry.name for entry in there.iterdir()], cutoff=0.8):
            if (meant := Path(there, near, *rest)).exists():
                return f"\n  Did you mean {meant}?"
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read, a path without a name
        return ""
    return ""


def tool(name: str) -> str:
    """The command of a tool, such as `preprocess.build_dataset`, that works where this process was started.

    In the repository's root it is `python -m tools.…`, elsewhere that of the installed package. `python -m` looks into the
    working directory first, then into PYTHONPATH.
    """
    file = Path("tools", *name.split(".")).with_suffix(".py")
    roots = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    package = "tools" if any((root / file).is_file() for root in map(Path, roots)) else "megatron_vocagno.tools"
    return f"python -m {package}.{name}"
