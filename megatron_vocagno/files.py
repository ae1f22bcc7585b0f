"""How a file comes onto the disk: whole or not at all, and for good.

Processes in containers share their numbers, so whatever is written for a while beside its place has a random name:
`.NAME.` and 32 hexadecimal digits. A writer that is killed leaves it; `remove_leftovers` is for one who knows that nobody writes.
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

RANDOM = re.compile(r"[0-9a-f]{32}")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers to flock."""
LOCAL = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}
"""Options of a mount under which a lock is not seen by other machines: Lustre's, and NFS's."""
MOUNTS = Path("/proc/mounts")


def write_durably(file: Path, data: bytes) -> None:
    """The whole file or nothing; on the disk when this returns."""
    with replacing(file) as temporary, temporary.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    sync(file.parent)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside a file: what the block writes there takes the file's place, unless it fails."""
    temporary = beside(file)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def beside(file: Path) -> Path:
    """A name that no other process has."""
    return file.with_name(f".{file.name}.{uuid4().hex}")


def remove_leftovers(file: Path) -> None:
    """What killed writers of a file left beside it. Only for one who knows that nobody is writing it now."""
    for path in file.parent.glob(f".{file.name}.*"):
        if RANDOM.fullmatch(path.name.removeprefix(f".{file.name}.")):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """With those above it, on the disk for good; nothing where it is there. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- locks


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
