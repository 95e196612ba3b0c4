"""What is left of memory, by the machine and by control groups of both versions; work in halves where it runs out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import MeasurementSettings
from safeneuron.models.model import generate
from safeneuron.runtime import devices
from safeneuron.runtime.devices import (
    Halving,
    MemoryShortage,
    available_memory,
    out_of_memory,
    peak_memory_mb,
    reporting_shortage,
    reset_peak_memory,
    resident_memory,
)
from safeneuron.selection.measurement import measure


def test_a_large_tensor_is_seen_in_all_figures():
    reset_peak_memory()
    resident, free, peak = resident_memory(), available_memory(), peak_memory_mb()
    large = torch.ones(50 * 2**20)
    assert resident_memory() - resident > 0.5 * large.nbytes
    assert peak_memory_mb() - peak > 0.5 * large.nbytes / 2**20
    assert free > available_memory() > 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_a_control_group_is_seen_without_the_cache(tmp_path, version):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (tmp_path / names[0]).write_text("1000\n")
    (tmp_path / names[1]).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"active_file 9\n{names[2]} 200\n")
    assert devices._left(tmp_path) == 500


def test_a_control_group_without_a_limit_leaves_everything(tmp_path):
    assert devices._left(tmp_path) == sys.maxsize
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("inactive_file 200\n")
    assert devices._left(tmp_path) == sys.maxsize


def test_the_tightest_limit_counts(tmp_path, monkeypatch):
    groups = [tmp_path / "inner", tmp_path]
    for folder, limit in zip(groups, (5000, 3000), strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(str(limit))
        (folder / "memory.current").write_text("1000")
        (folder / "memory.stat").write_text("")
    monkeypatch.setattr(devices, "_control_groups", lambda: iter(groups))
    assert available_memory() == 2000


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024)])
def test_the_peak_is_in_megabytes_on_every_system(monkeypatch, system, unit):
    """Where there is no /proc the system's own figure is taken: bytes on macOS, kB elsewhere."""
    peak = 300 * 2**20
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(devices, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    monkeypatch.setattr(devices.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peak // unit))
    assert peak_memory_mb() == 300


def test_the_groups_of_this_process_are_folders_below_the_root():
    for folder in devices._control_groups():
        assert folder.as_posix().startswith("/sys/fs/cgroup")


ignore_shortage = pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")


def scarce(
    most: int, cost: Callable[[Sequence[int]], int] = len
) -> tuple[list[list[int]], Callable[[Sequence[int]], int]]:
    """Work that adds up its numbers, and fails on parts that cost more than ``most``; and the parts it was given."""
    given: list[list[int]] = []

    def work(part: Sequence[int]) -> int:
        given.append(list(part))
        if cost(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sum(part)

    return given, work


@ignore_shortage
def test_parts_that_fail_are_halved_until_they_fit_and_that_is_remembered():
    given, work = scarce(most=2)
    small = Halving("adding", "add less")
    assert sum(small.over([1, 2, 3, 4, 5, 6, 7], work)) == 28
    assert given == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4], [1, 2], [3, 4], [5, 6], [7]]
    given.clear()
    assert small.over([10, 20, 30], work) == [30, 30]
    assert given == [[10, 20], [30]]


@ignore_shortage
def test_what_is_remembered_is_what_memory_depends_on():
    given, work = scarce(most=6, cost=sum)
    by_sum = Halving("adding", "add less", cost=sum)
    assert by_sum.over([5, 4], work) == [5, 4]
    given.clear()
    by_sum.over([1, 1, 1, 1], work)
    assert given == [[1, 1, 1, 1]]


def test_one_item_that_does_not_fit_is_explained():
    _, work = scarce(most=0)
    with pytest.raises(InputError, match="memory"):
        Halving("adding", "add less").over([1], work)


def test_each_halving_is_told_once():
    _, work = scarce(most=2)
    told: list[str] = []
    with reporting_shortage(told.append), warnings.catch_warnings():
        warnings.simplefilter("always")
        small = Halving("adding", "add less")
        small.over([1, 2, 3, 4], work)
        small.over([1, 2, 3, 4], work)
    assert told == ["adding ran out of memory with 4 at once; it goes on with 2, and remembers that"]


def test_other_warnings_are_shown_as_always():
    told: list[str] = []
    with pytest.warns(UserWarning, match="else") as shown, reporting_shortage(told.append):
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert len(shown) == 1
    assert told == []


def test_other_errors_are_not_caught():
    def work(part: Sequence[int]) -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving("adding", "add less").over([1, 2], work)


def test_an_allocation_that_really_fails_is_recognised():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(failure.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("whatever it says"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


@ignore_shortage
def test_memory_is_handed_back_when_the_failed_pass_is_gone(monkeypatch):
    alive: list[object] = []

    class Large:
        def __init__(self) -> None:
            alive.append(self)

        def __del__(self) -> None:
            freed.append(True)

    freed: list[bool] = []
    found: list[bool] = []
    monkeypatch.setattr(devices, "hand_back_memory", lambda: found.append(bool(freed)))

    def work(part: Sequence[int]) -> int:
        large = Large()
        alive.clear()
        if len(part) > 1:
            raise torch.OutOfMemoryError(f"out of memory with {id(large)}")
        return 0

    Halving("adding", "add less").over([1, 2], work)
    assert found == [True]


# -- models that are short of memory ----------------------------------------------------------------------------------


def short_of_memory(monkeypatch: pytest.MonkeyPatch, places: int) -> list[tuple[int, ...]]:
    """Passes of more than so many tokens fail from now on; the shapes of those that do not."""
    passed: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def limited(network: LlamaModel, *args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        if ids.numel() > places:
            raise torch.OutOfMemoryError("out of memory, as if")
        passed.append(tuple(ids.shape))
        return forward(network, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", limited)
    return passed


def prompts(verb: str) -> list[Prompt]:
    return [Prompt(f"how to {verb} " + "it " * (number % 5) + str(number)) for number in range(12)]


def test_measuring_goes_on_with_fewer_tokens(tiny_model, monkeypatch):
    unsafe, safe = prompts("break"), prompts("bake")
    before = measure(tiny_model, unsafe, safe, MeasurementSettings(batch_tokens=512))
    passed = short_of_memory(monkeypatch, places=150)
    with pytest.warns(MemoryShortage, match="memory"):
        after = measure(tiny_model, unsafe, safe, MeasurementSettings(batch_tokens=512))
    for one, other in ((before.unsafe, after.unsafe), (before.safe, after.safe)):
        assert one.count == other.count
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-4, atol=1e-6)
    # Not all the way down to one prompt a pass, and never again too much.
    assert max(rows for rows, _ in passed) > 1


def test_answering_goes_on_with_smaller_batches(tiny_model, monkeypatch):
    encoded = [tiny_model.encode([{"role": "user", "content": prompt.text}]) for prompt in prompts("break")]
    before = list(generate(tiny_model, encoded, 5, 6))
    passed = short_of_memory(monkeypatch, places=3 * len(encoded[4]))
    with pytest.warns(MemoryShortage, match="memory"):
        after = list(generate(tiny_model, encoded, 5, 6))
    assert after == before
    assert max(rows for rows, _ in passed) == 3
