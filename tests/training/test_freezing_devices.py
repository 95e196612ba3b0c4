"""Frozen neurons on several devices: two CPU processes, started once by torchrun, run every case of a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin

from tests import ROOT
from tests.programs import devices_worker, experts_worker, zero_worker

CONFIGS = sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml"))
Outcomes = list[dict[str, str]]


def outcomes(worker: str, folder: Path, **changes: str) -> Outcomes:
    """What became of each case in either process: nothing, or where it failed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **changes}
    command = [*launcher, f"tests/programs/{worker}.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    files = [folder / f"process-{number}.json" for number in (0, 1)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def assert_passed(case: str, found: Outcomes) -> None:
    for number, outcome in enumerate(found):
        failure = outcome.get(case, "not reached, as an earlier case failed")
        assert not failure, f"process {number}: {failure}"


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    return outcomes("devices_worker", tmp_path_factory.mktemp("devices"))


@pytest.mark.slow
@pytest.mark.parametrize("case", devices_worker.CASES)
def test_two_processes(case, devices):
    assert_passed(case, devices)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return outcomes("experts_worker", tmp_path_factory.mktemp("experts"))


@pytest.mark.slow
@pytest.mark.parametrize("case", experts_worker.CASES)
def test_two_processes_with_a_mixture_of_experts(case, experts):
    assert_passed(case, experts)


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return outcomes("zero_worker", tmp_path_factory.mktemp("zero"), DS_ACCELERATOR="cpu")


@pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (DS_BUILD_OPS=0 pip install deepspeed==0.19.8)",
)
@pytest.mark.parametrize("case", zero_worker.CASES)
def test_two_processes_of_deepspeed(case, zero):
    assert_passed(case, zero)


# -- the shipped configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_what_accelerate_understands(path):
    """accelerate reads the file, and every setting in it arrives in the environment of the processes."""
    config = yaml.safe_load(path.read_text())
    given = devices_worker.environment_of(path)
    assert given["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with patch.dict(os.environ, given, clear=True):
        if "fsdp_config" in config:
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.fsdp_version == 2
            assert plugin.reshard_after_forward
            assert plugin.activation_checkpointing
            assert plugin.cpu_ram_efficient_loading
            assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
        if "parallelism_config" in config:
            sizes = ParallelismConfig()
            assert (sizes.dp_replicate_size, sizes.dp_shard_size, sizes.total_size) == (8, 8, config["num_processes"])
        if "deepspeed_config" in config:
            wanted = {"ZERO_STAGE": "3", "ZERO3_INIT": "true", "ZERO3_SAVE_16BIT_MODEL": "true"}
            assert {name: given[f"ACCELERATE_DEEPSPEED_{name}"].lower() for name in wanted} == wanted


def test_shipped_configs_are_for_as_many_devices_as_their_names_say():
    words = {"one": 1, "eight": 8, "sixty": 64}
    processes = {path.stem: yaml.safe_load(path.read_text())["num_processes"] for path in CONFIGS}
    assert processes == {name: words[name.partition("_")[0]] for name in processes}
    assert set(processes.values()) == {1, 8, 64}


def test_shipped_configs_are_described():
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    assert [path.name for path in CONFIGS if f"examples/configs/accelerate/{path.name}" not in page] == []
