"""The memory of this process: kept between steps, handed back between stages, and measured at its highest."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path


def reuse_memory() -> None:
    """Let the C library keep freed memory instead of handing it back to the system after every large tensor.

    Each tensor of a training step would otherwise be new pages for the kernel to clear: a third of the time of a step
    on the CPU. Only glibc knows the call; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def hand_back_memory() -> None:
    """Give the system what ``reuse_memory`` has kept, once a stage is over."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def reset_peak_memory() -> None:
    """Start a new high-water mark of this process's memory, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb() -> float:
    """The process's largest resident memory in MB since ``reset_peak_memory``, or since its start."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        status = []
    since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")), since_start)
