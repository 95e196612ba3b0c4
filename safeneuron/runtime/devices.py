"""The memory of this process: kept between steps, handed back between stages, measured, and what is left of it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.runtime.patches import warnings_told


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
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
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
    """The process's largest resident memory in MB of 2**20 bytes since ``reset_peak_memory``, or since its start."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        status = []
    # The system's own figure is in bytes on macOS and in kB elsewhere.
    since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")), since_start)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def available_memory() -> int:
    """Bytes that this process could still take without the system running short.

    The least of what the machine has available and what the limits of the process's control groups, of either version,
    leave; the page cache, which can be dropped, does not count as taken.
    """
    machine = int(psutil.virtual_memory().available)
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


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's errors say when an allocation has failed, on the CPU, on a GPU and in the libraries it calls."""


class MemoryShortage(UserWarning):
    """Memory ran out, and the work goes on in smaller parts."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in SIGNS))
    )


def reporting_shortage(tell: Callable[[str], None]) -> AbstractContextManager[None]:
    """Within the block a ``MemoryShortage`` is told to ``tell`` instead of being shown as Python shows warnings."""
    return warnings_told(MemoryShortage, tell)


class Halving(Generic[_Item]):
    """Work on lists of items, in parts that fit into memory: where one does not, its halves are tried, and remembered.

    ``most`` is what a part may cost, 0 for no limit yet; ``cost`` is what memory depends on, the number of items if
    nothing else is said. ``what`` names the work and ``advice`` says what a user can do when a single item is too much.
    """

    def __init__(self, what: str, advice: str, cost: Callable[[Sequence[_Item]], int] = len, most: int = 0) -> None:
        self.what = what
        self.advice = advice
        self.cost = cost
        self.most = most

    def parts(self, items: Sequence[_Item]) -> list[Sequence[_Item]]:
        """The items in order, in parts that cost no more than ``most``, made by halving; the larger half is first."""
        if len(items) <= 1 or not self.most or self.cost(items) <= self.most:
            return [items]
        middle = (len(items) + 1) // 2
        return [*self.parts(items[:middle]), *self.parts(items[middle:])]

    def over(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], _Result]) -> list[_Result]:
        """What ``work`` makes of the parts, in order. Raises ``InputError`` if a single item is too much."""
        waiting = self.parts(items)
        results: list[_Result] = []
        while waiting:
            try:
                results.append(work(waiting[0]))
                del waiting[0]
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self.halve(waiting[0], error)
            # Only here, where the exception is gone, are the tensors of the failed pass free.
            hand_back_memory()
            waiting = [part for large in waiting for part in self.parts(large)]
        return results

    def halve(self, part: Sequence[_Item], error: BaseException) -> None:
        """Let no later part cost more than half of this one, which was too much; one warning says so.

        Raises ``InputError`` if the part is a single item.
        """
        if len(part) == 1:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{self.what} ran out of memory with one at a time ({reason}); {self.advice}") from error
        middle = (len(part) + 1) // 2
        self.most = max(self.cost(part[:middle]), self.cost(part[middle:]))
        warnings.warn(
            f"{self.what} ran out of memory with {len(part)} at once; it goes on with {middle}, and remembers that",
            MemoryShortage,
            stacklevel=3,
        )


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself; elsewhere bfloat16 is emulated and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def device_named(wanted: str) -> torch.device:
    """The device that a config means, ``auto`` or one of torch's. Raises ``InputError`` if it is not there."""
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    except RuntimeError as error:
        raise InputError(f"device {wanted!r} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and distributed.world() > 1:
        return _own_gpu(wanted)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {wanted!r} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; "
            "use device = 'auto'"
        )
    return place


def _own_gpu(wanted: str) -> torch.device:
    """The GPU of this rank, which is made the current one, so that nothing strays to another rank's."""
    gpus, number = torch.cuda.device_count(), distributed.local_rank()
    if torch.device("cuda" if wanted == "auto" else wanted).index is not None:
        raise InputError(
            f"device {wanted!r} was asked for by {distributed.world()} processes, which need a GPU each; "
            "use device = 'auto'"
        )
    if number >= gpus:
        raise InputError(
            f"this is process {number + 1} on a machine where torch {torch.__version__} sees {gpus} GPUs; start no "
            "more processes than there are GPUs"
        )
    place = torch.device("cuda", number)
    torch.cuda.set_device(place)
    return place


def dtype_named(wanted: str, device: torch.device) -> torch.dtype:
    """The data type that a config means; ``auto`` is bfloat16 where that pays. Raises ``InputError`` if unknown."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted == "auto":
        return torch.bfloat16 if bfloat16_pays(device) else torch.float32
    if wanted not in known:
        raise InputError(f"dtype {wanted!r} is unknown; expected auto, {', '.join(known)} or stored")
    return known[wanted]
