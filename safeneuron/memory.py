"""The memory of this process: kept between steps, handed back between stages, measured, and what is left of it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
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
    """Give the system what ``reuse_memory`` has kept, and the GPU what torch has, once a stage is over."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
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


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where Linux does not say."""
    return _figure(Path("/proc/self/status"), "VmRSS:") or 0


def available_memory() -> int | None:
    """Bytes that this process could still take without the system running short; ``None`` where Linux does not say.

    The least of what the machine has available and what the limits of the process's control groups, of either version,
    leave; the page cache, which can be dropped, does not count as taken.
    """
    machine = _figure(Path("/proc/meminfo"), "MemAvailable:")
    if machine is None:
        return None
    return max(0, min([machine, *(_left(folder) for folder in _control_groups())]))


def _control_groups() -> Iterator[Path]:
    """The folders of the control groups that limit this process's memory, from the innermost outwards."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        # Inside a container the path may be that of the host, which is not there; the root then is the container's.
        folder = root / place.strip("/")
        yield from (inside for inside in (folder, *folder.parents) if inside == root or root in inside.parents)


def _left(folder: Path) -> int:
    """Bytes below the limit of a control group; ``sys.maxsize`` where it sets none."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return sys.maxsize if most == "max" else int(most) - taken + int(counts.get(cache, 0))
    return sys.maxsize


def _figure(file: Path, name: str) -> int | None:
    """A figure in kB of a file of Linux, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
