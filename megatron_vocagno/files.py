"""Durable and atomic writes, hashes and locks of files.

A file is first written under a temporary name in the same folder: `.NAME.` and 32 random hexadecimal digits. The name is random
because processes in different containers can have the same process id. A writer that is killed leaves its temporary file behind.
`remove_leftovers` removes such files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal
from uuid import uuid4

from megatron_vocagno.compat import sha256_of

RANDOM = re.compile(r"[0-9a-f]{32}")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of flock on a file system that does not support locks."""
LOCAL = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}
"""Mount options of Lustre and NFS with which locks are not visible to other machines."""
MOUNTS = Path("/proc/mounts")


def write_durably(file: Path, data: bytes) -> None:
    """Write a file completely or not at all. The file is on the disk when this function returns. Raises OSError."""
    with replacing(file) as temporary, temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    sync(file.parent)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of a file. It replaces the file after the block, or is removed if the block fails."""
    temporary = beside(file)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def beside(file: Path) -> Path:
    """A temporary path in the folder of a file, which no other process uses."""
    return file.with_name(f".{file.name}.{uuid4().hex}")


def remove_leftovers(file: Path) -> None:
    """Remove the temporary files of killed writers of a file. Call this only when no process is writing the file."""
    for path in file.parent.glob(f".{file.name}.*"):
        if RANDOM.fullmatch(path.name.removeprefix(f".{file.name}.")):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably. Does nothing if the folder exists. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return sha256_of(file)


# ---- locks


def try_lock(stream: IO[Any], how: int = fcntl.LOCK_EX) -> Literal["taken", "held", "none"]:
    """Lock an open file without waiting, until the stream is closed. Raises OSError.

    returns  "held" if another process holds the lock, "none" if the file system does not support locks
    """
    try:
        fcntl.flock(stream, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return "none"
    return "taken"


def wait_for_lock(stream: IO[Any]) -> bool:
    """Wait for the lock of an open file, and hold it until the stream is closed. Raises OSError.

    returns  False, without waiting, if the file system does not support locks
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def local_option(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The mount option because of which locks of this path are not visible to other machines; None if there is none."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # not Linux: mount options are unknown
    where, found = path.resolve(), ""
    depth = -1
    for line in lines:
        _, folder, _, options, *_ = line.split(" ")
        mount = Path(folder.encode("latin-1", "surrogateescape").decode("unicode_escape"))  # a space is \040
        if where.is_relative_to(mount) and len(mount.parts) >= depth:  # the last of several mounts at one path hides the others
            depth, found = len(mount.parts), options
    return next((option for option in found.split(",") if option in LOCAL), None)
