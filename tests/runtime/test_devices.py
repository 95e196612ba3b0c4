"""What is left of memory, by the machine and by control groups of both versions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from safeneuron.runtime import devices
from safeneuron.runtime.devices import available_memory, peak_memory_mb, reset_peak_memory, resident_memory


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
