"""Several processes give what one gives: the same scores, answers and results; and they end together."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import safeneuron
from safeneuron.cli import app
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import device_named
from safeneuron.runtime.files import read_json, read_lines
from safeneuron.training.settings import TrainingSettings, last_checkpoint, require_trainable_settings
from tests.helpers import tiny_run
from tests.helpers.tiny_run import results
from tests.programs import ranks_program

ROOT = Path(safeneuron.__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
CLEAN = {name: value for name, value in os.environ.items() if name not in distributed.LAUNCHED}
ENVIRONMENT = {**CLEAN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PATIENCE = 300
SMALL = [
    "attack.batch_size=1", 'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.curve=[]", "variants={}",
    "align.rounds=1",
]  # fmt: skip
NAMES = ("progress", "answers from 0", "answers from 2", "perplexity", "attack", "pairs", "not finite")


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


def two(folder: Path, fault: str, *arguments: str) -> tuple[list[int], str]:
    """The program in two processes that no launcher watches, with a fault in one; exit codes, and stderr of both."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.programs.ranks_program", "cli", str(folder), fault, *arguments]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = "".join(process.communicate(timeout=PATIENCE)[1] for process in started)
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def sentences(errors: str) -> list[str]:
    """What was printed, but for the warnings of the run."""
    return [line for line in errors.splitlines() if not line.startswith("warning: ")]


# -- one process ------------------------------------------------------------------------------------------------------


def test_a_process_on_its_own_is_all_ranks_at_once(monkeypatch):
    for name in distributed.LAUNCHED[:-1]:
        monkeypatch.setenv(name, "7")
    assert (distributed.world(), distributed.rank(), distributed.local_rank(), distributed.is_main()) == (1, 0, 0, True)
    assert distributed.gather("x") == ["x"]
    assert distributed.from_main(lambda: "y") == "y"
    assert list(distributed.deal([1, 2, 3], str)) == ["1", "2", "3"]
    assert distributed.first_to_fail(2) is None
    distributed.leave()


def test_a_launcher_that_ends_the_processes_is_like_ctrl_c(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(app, "app", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            app.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def launched(monkeypatch):
    """This process as rank 1 of 2, for what asks only that."""
    for name, value in zip(distributed.LAUNCHED, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "refresh", "said"),
    [
        ({}, True, ""),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, False, ""),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True, "refresh"),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "FSDP1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "DeepSpeed"),
    ],
)
def test_ways_of_sharing_that_are_not_exact_are_refused(launched, environment, refresh, said):
    for name, value in environment.items():
        launched.setenv(name, value)
    if not said:
        require_trainable_settings(TrainingSettings(), refresh)
        return
    with pytest.raises(InputError, match=said) as error:
        require_trainable_settings(TrainingSettings(), refresh)
    assert "\n" not in str(error.value)


def test_each_rank_has_a_gpu_of_its_own(launched):
    chosen: list[object] = []
    launched.setattr(torch.cuda, "is_available", lambda: True)
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    launched.setattr(torch.cuda, "set_device", chosen.append)
    assert [device_named(wanted) for wanted in ("auto", "cuda", "cpu")] == list(
        map(torch.device, ("cuda:1", "cuda:1", "cpu"))
    )
    assert chosen == [torch.device("cuda:1")] * 2
    with pytest.raises(InputError, match="2 processes"):
        device_named("cuda:0")
    launched.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="1 GPUs"):
        device_named("auto")


def test_it_needs_no_torch():
    code = (
        "from safeneuron.runtime import distributed\ndistributed.barrier()\ndistributed.leave()\n"
        "import sys\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


# -- the functions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a tiny world, with its config ``tiny.toml``."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_run.write_world(folder)
    return folder


@pytest.fixture(scope="module")
def facts(world) -> list[dict[str, Any]]:
    """What two ranks saw."""
    done = subprocess.run(
        [*TORCHRUN, "-m", "tests.programs.ranks_program", "functions", str(world)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((world / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process computes."""
    return ranks_program.computed()


def test_ranks_hear_one_another(facts):
    first, second = (seen["exchanged"] for seen in facts)
    assert (first["rank"], second["rank"]) == ([0, 2, 0, True], [1, 2, 1, False])
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["dealt"] == [[10, 0], [20, 1], [30, 0]]
    assert first["from main"][:2] == [0, 1], "rank 0 is alone while the others wait"
    assert first["refused"] == "rank 0 says no"
    assert first["agreed"] == "second"
    assert first["large"] == [2**21, 2**21 + 1]
    assert first["tensors"] == [[0.0, 0.5], [1.0, 0.5]]
    assert first["alone"] == [1, 0, True, [0], ["1", "2", "3"]]
    assert second["alone"] == [1, 0, False, [1], ["1", "2", "3"]]
    apart = {"rank", "alone"}
    assert {k: v for k, v in first.items() if k not in apart} == {k: v for k, v in second.items() if k not in apart}


@pytest.mark.parametrize("batches", ["many batches", "few batches"])
def test_scores_are_those_of_one_process(facts, alone, batches):
    expected = alone[batches]
    for seen in facts:
        found = seen["computed"][batches]
        assert found["counts"] == expected["counts"] == [7, 5]
        for ours, theirs in zip(found["scores"], expected["scores"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)
    assert facts[0]["computed"][batches] == facts[1]["computed"][batches], "bit for bit the same on every rank"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_is_what_one_process_computes(facts, alone, name):
    assert alone[name]
    assert [seen["computed"][name] for seen in facts] == [alone[name]] * 2


def test_activations_that_are_not_finite_on_one_rank_are_an_error_on_all(facts):
    assert all("not finite on the prompt 'zzzz" in seen["computed"]["not finite"] for seen in facts)


def test_the_judge_is_asked_on_rank_0_only(facts, alone):
    assert [seen["computed"]["judged"] for seen in facts] == [alone["judged"], 0]


def test_a_run_without_training_has_the_very_same_results(facts, world, tmp_path):
    stages = tiny_run.execute(world / "tiny.toml", tmp_path, changes=ranks_program.AUDIT).of("began")
    assert results(world / "audit") == results(tmp_path)
    assert facts[0]["audit"] == facts[1]["audit"] == stages
    assert len((world / "audit" / "log.txt").read_text().splitlines()) == len(stages), "one rank has written"


def test_a_batch_is_shared_by_the_ranks(facts):
    *sizes, refusal = facts[0]["exchanged"]["micro-batches"]
    assert sizes == [4, 2, 6, 1]
    assert "batch_size (3) must be a multiple of the number of processes (2)" in refusal


def test_training_with_sharded_weights_is_that_of_one_process(facts, tmp_path):
    expected = ranks_program.aligned(tmp_path)
    assert facts[0]["aligned"] == facts[1]["aligned"]
    assert facts[0]["sharded"] == ["FSDPLlamaForCausalLM"] * 3, "the weights were really spread"
    found = facts[0]["aligned"]
    assert found["checkpoints"] == expected["checkpoints"] == ["checkpoint-2"]
    for name in ("first", "second"):
        assert found[name]["losses"] == pytest.approx(expected[name]["losses"], rel=1e-4)
        assert found[name]["losses"][0] == pytest.approx(math.log(2), abs=1e-5), "the reference is the model as given"
        assert found[name]["free_change"] == pytest.approx(expected[name]["free_change"], rel=1e-3)
        assert found[name]["plain"]
        assert found[name]["identical"]
        assert found[name]["frozen"] == expected[name]["frozen"]
        assert found[name]["fingerprint"] == expected[name]["fingerprint"]


def test_sharded_training_in_bfloat16_keeps_the_log_probabilities_exact(facts):
    """accelerate would round them, and so the difference between policy and reference that DPO learns from."""
    losses = facts[0]["aligned"]["bfloat16"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]


def test_a_checkpoint_that_is_spread_is_for_training_that_is(facts, world):
    checkpoints = world / "checkpoints"
    assert last_checkpoint(checkpoints, sharded=True) == str(checkpoints / "checkpoint-3")
    with pytest.raises(InputError, match="FSDP2"):
        last_checkpoint(checkpoints)


def test_every_rank_reads_the_weights_of_a_model_that_it_loads(facts, world):
    network = load(world / "checkpoints" / "model", "float32").network
    size = float(sum(weight.detach().double().square().sum() for weight in network.parameters()))
    assert [seen["loaded"] for seen in facts] == [size, size]


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """A run that was stopped in rank 1 while it answered: ``(its folder, exit codes, stderr)``."""
    folder = tmp_path_factory.mktemp("interrupted")
    changes = [part for change in SMALL for part in ("--set", change)]
    codes, errors = two(folder, "interrupt", "run", str(world / "tiny.toml"), "--out", str(folder / "run"), *changes)
    return folder, codes, errors


def test_ctrl_c_in_one_rank_ends_all_with_one_sentence(interrupted):
    folder, codes, errors = interrupted
    assert sentences(errors) == ["stopped; what is finished is kept, and the same command goes on from here"], errors
    assert codes == [130, 130]
    assert [(folder / f"exit-{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    assert not list(folder.rglob("*.part"))
    (stream,) = (folder / "run" / "T0" / "attack").glob("*/*.jsonl")
    assert len(read_lines(stream)) == 2, "one answer of each"


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(interrupted, world, tmp_path):
    shutil.copytree(interrupted[0] / "run", tmp_path / "run")
    changes = [*SMALL, "align.rounds=0"]
    tiny_run.execute(world / "tiny.toml", tmp_path / "run", changes=changes)
    tiny_run.execute(world / "tiny.toml", tmp_path / "straight", changes=changes)
    assert results(tmp_path / "run") == results(tmp_path / "straight")


@pytest.fixture(scope="module")
def failed(interrupted, world):
    """The same run, gone on with by two processes until rank 1 failed while it trained: as before."""
    folder = interrupted[0]
    codes, errors = two(folder, "mistake", "align", str(folder / "run"), "--redo", "T0/attack")
    return folder, codes, errors


@pytest.mark.slow
def test_a_mistake_found_by_one_rank_while_training_ends_all_with_one_sentence(failed):
    folder, codes, errors = failed
    assert sentences(errors) == ["error: rank 1 has found a mistake"], errors
    assert codes == [2, 2]
    assert not list(folder.rglob("*.part"))
    assert not (folder / "run" / "T1" / "align" / "done.json").exists()
    assert list((folder / "run" / "T1" / "align" / "checkpoints").glob("*/complete"))


@pytest.mark.slow
def test_two_processes_go_on_and_end_as_one_would(failed, world, tmp_path):
    """Started by torchrun; the training goes on from the checkpoint, with its neurons frozen, and the proof holds."""
    folder = failed[0] / "run"
    done = subprocess.run(
        [*TORCHRUN, "-m", "safeneuron", "run", str(folder / "config.toml"), "--out", str(folder)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("T1/align ...") == 1, "one rank speaks"
    assert lines[-1] == f"wrote {folder}/report/results.json"
    tiny_run.execute(read_config(world / "tiny.toml", SMALL), tmp_path)
    found, expected = (read_json(path / "T1" / "align" / "frozen.json") for path in (folder, tmp_path))
    assert found["frozen_identical"]
    assert found["frozen"] == expected["frozen"] > 0
    assert found["frozen_sha256"] == expected["frozen_sha256"]
    assert found["free_change"] == pytest.approx(expected["free_change"], rel=1e-4)
    logs = [read_lines(path / "T1" / "align" / "train.jsonl") for path in (folder, tmp_path)]
    assert [entry["loss"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[1]], rel=1e-4)
    states = [read_json(path / "report" / "results.json")["states"] for path in (folder, tmp_path)]
    assert states[0][0] == states[1][0], "T0 is the very same"
    assert not (folder / "T1" / "align" / "checkpoints").exists()
