"""What a user can mend: the one kind of error that a command tells without a traceback; and what to say of a missing path."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


class UserError(Exception):
    """Something that a user can cause and mend; the message says what to do. Each part of the package has its own kind."""

    exit_code = 2


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
