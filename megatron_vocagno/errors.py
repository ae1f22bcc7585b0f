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
    """A run that cannot start or continue: because of its file, an override, a path, or parts that do not fit together."""


class SharedError(RunError):
    """A RunError that all ranks raise together. Only the first rank prints it."""


class RunLockedError(SharedError):
    """Another run is using the output folder. A later start may succeed."""

    exit_code = 1


class VersionError(RunError):
    """A checkpoint that another release wrote."""


class ModelError(UserError):
    """A model that cannot be used as requested."""


class CorpusError(UserError):
    """An input, a tokenizer or a dataset that cannot be used as requested."""


class ServerError(UserError):
    """A server that does not give a teacher's losses, or gives those of another model or text."""


class ServerLostError(ServerError):
    """The teacher is no longer served: no server answers, or another model does. A later start may succeed."""

    exit_code = 1


class DatasetError(CorpusError):
    """A dataset that is missing, damaged, of another version, or made with another tokenizer than the caller needs."""


class ChangedError(CorpusError):
    """Files that were made from other input, or with other settings."""


class TokenizerError(CorpusError):
    """A tokenizer that cannot be read, or whose tokens cannot be placed in the text."""


class EncoderError(CorpusError):
    """A tokenizer that a backend cannot read."""


class EncoderMismatchError(CorpusError):
    """gigatoken and Hugging Face give different ids for one text."""


class BrokenInputError(Exception):
    """A file that is cut off or damaged. The message has the reason. Callers turn the error into a bad record."""


class HubError(UserError):
    """A model that the Hub does not provide. The message has the reason, and callers add the purpose of the model."""


def lfs_pointer(content: bytes) -> str:
    """The end of a message about a file that Git LFS has not fetched; "" for any other file.

    content  the file's first bytes, or all of them
    """
    if not content.startswith(b"version https://git-lfs"):
        return ""
    return "is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder."


def missing_path_hint(path: str | os.PathLike[str]) -> str:
    """The end of a message about a path that does not exist: the absolute path if it is relative, and a similar name.

    "" if the path exists, for example a folder where a file is expected.
    """
    asked = Path(path).expanduser()
    if asked.is_absolute() or os.path.lexists(asked):
        return nearest(path)
    place = f"\n  The absolute path is {asked.resolve()}: relative paths start at the folder in which you run the command."
    return place + nearest(path)


def nearest(path: str | os.PathLike[str]) -> str:
    """A suggestion of an existing path that differs by a typo in one name; "" if there is none."""
    asked = Path(path).expanduser()
    if os.path.lexists(asked):
        return ""
    try:
        existing = next((folder for folder in asked.parents if folder.is_dir()), Path())
        name, *rest = asked.relative_to(existing).parts
        if len(Path(name).stem) < 3:  # too short to be similar to another name
            return ""
        for near in difflib.get_close_matches(name, [entry.name for entry in existing.iterdir()], cutoff=0.8):
            if (meant := Path(existing, near, *rest)).exists():
                return f"\n  Did you mean {meant}?"
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read, a path without a name
        return ""
    return ""


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun. several: the plural, if it is not `one` with an s.

    >>> counted(1, "shard"), counted(2138, "row")
    ('1 shard', '2,138 rows')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"


SCRIPTS = {
    "preprocess.build_dataset": "vocagno-build",
    "preprocess.score_teacher": "vocagno-score",
    "preprocess.report": "vocagno-report",
    "preprocess.show_document": "vocagno-show",
    "convert.gguf_to_safetensors": "vocagno-convert",
}
"""The commands that an installation adds, by tool."""


def tool(name: str) -> str:
    """The command of a tool, such as `preprocess.build_dataset`, in the folder in which this process was started.

    In the repository's root this is `python -m tools.…`, elsewhere the command that an installation adds. `python -m` searches
    the working directory first, then PYTHONPATH.
    """
    file = Path("tools", *name.split(".")).with_suffix(".py")
    roots = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return f"python -m tools.{name}" if any((root / file).is_file() for root in map(Path, roots)) else SCRIPTS[name]
