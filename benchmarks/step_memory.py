"""Peak memory of a stretch of a process: VmHWM, which is set back to what the process holds when the stretch begins.

The standard library alone, since the process may be of another environment.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def start() -> int:
    """Bytes that the process holds now. What it has freed is given back to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Bytes that the process has held at most since `start`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
