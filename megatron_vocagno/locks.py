"""Locks on files (flock), and what they are worth: some file systems have none, on some they hold on one machine alone."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO, Any, Literal

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers to flock."""
LOCAL = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}
"""Options of a mount under which a lock is not seen by other machines: Lustre's, and NFS's."""
MOUNTS = Path("/proc/mounts")


def try_lock(stream: IO[Any], how: int = fcntl.LOCK_EX) -> Literal["taken", "held", "none"]:
    """held: by another; none: the file system has no locks. Raises OSError."""
    try:
        fcntl.flock(stream, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return "none"
    return "taken"


def wait_for_lock(stream: IO[Any]) -> None:
    """Holds it until the stream is closed; at once on a file system without locks. Raises OSError."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def local_option(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The option of the mount that holds a path by which its locks are local to a machine; None without one."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # no Linux: nothing is known
    where, found = path.resolve(), ""
    depth = -1
    for line in lines:
        _, folder, _, options, *_ = line.split(" ")
        mount = Path(folder.encode("latin-1", "surrogateescape").decode("unicode_escape"))  # a space is \040
        if where.is_relative_to(mount) and len(mount.parts) >= depth:  # of several at one place the last hides the others
            depth, found = len(mount.parts), options
    return next((option for option in found.split(",") if option in LOCAL), None)
