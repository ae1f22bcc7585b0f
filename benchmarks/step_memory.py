"""Peak memory of a part of a process: VmHWM, which is reset when the part begins.

This module only uses the standard library, because the process may belong to another environment.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def start() -> int:
    """Reset the peak; returns the bytes that the process holds. Freed memory is returned to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak bytes of the process since `start`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
