"""From a config to what its stages need; a run whose training is made to fit, and one that is refused in time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safeneuron.config.schema import Config
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.models.shape import Shape
from safeneuron.planning import memory
from safeneuron.planning.memory import GB, MARGIN, Device, align_need, total_bytes
from safeneuron.planning.plan import device_asked, table_of_needs, time_words
from safeneuron.runtime.files import read_json, read_lines
from safeneuron.training.settings import TrainingSettings
from tests.helpers.large import seventy_billion
from tests.helpers.tiny_run import Watch, execute, results, write_world

ONE_ROUND = ("align.rounds=1", "variants={}", "attack.sets=[]", "attack.curve=[]")


def row(lines: list[str], name: str) -> list[str]:
    """The cells of a row of the table."""
    return next(line[len(name) :].split() for line in lines if line.startswith(name))


def test_the_table_of_a_large_model_on_devices_that_are_not_here(tmp_path):
    config = read_config("paper-llama", [f'model.name="{seventy_billion(tmp_path)}"'])
    lines = table_of_needs(config, device_asked(config, "80GB", 8, sharded=True))
    assert lines[0].endswith("70,553,706,496 parameters in 80 layers")
    assert lines[1].startswith("on each of 8 devices with 80.0 GB, which share what is trained (FSDP2)")
    assert row(lines, " ")[:3] == ["measure", "attack", "align"]
    assert row(lines, "weights")[0] == f"{2 * 70_553_706_496 / GB:.2f}"
    assert row(lines, "optimizer")[2] == f"{70_553_706_496 / GB:.2f}"
    assert set(row(lines, "fits")) == {"no"}
    roomy = table_of_needs(config, device_asked(config, "2TB", 8, sharded=True))
    assert set(row(roomy, "fits")) == {"yes"}
    assert any(line.startswith("align: fits with") for line in roomy)


def test_only_variants_that_need_another_amount_have_a_column(tmp_path):
    """The plain DPO of the tiny config needs as much as its main training."""
    config = read_config(write_world(tmp_path), ["variants.many={micro_batch_size=640,batch_size=640}"])
    lines = table_of_needs(config, Device("cuda", 0.8 * GB, bfloat16=True))
    assert row(lines, " ") == ["measure", "attack", "align", "many"]
    assert lines[-2].startswith("align: fits with 1 pair at a time, up to ")
    assert lines[-1].startswith("many: is made to fit with ")


def test_an_audit_has_no_training():
    config = read_config("audit", ['model.name="embedded"'])
    assert row(table_of_needs(config, Device("cpu", GB, False)), " ") == ["measure", "attack"]


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * GB), ("1.5 TB", 1536 * GB), ("512 MiB", GB / 2), ("24g", 24 * GB)]
)
def test_sizes_of_devices(text, size):
    assert device_asked(read_config("demo"), text, 1, True) == Device("cuda", size, True, 1, sharded=False)


def test_without_a_size_it_is_this_machine():
    asked = device_asked(read_config("demo", ["model.device='cpu'"]), "", 4, False)
    assert (asked.kind, asked.count, asked.sharded) == ("cpu", 4, False)
    assert asked.memory > 0


def test_what_is_no_size_is_explained():
    with pytest.raises(InputError, match="--device-memory expects a size such as 80GB, but found 'much'"):
        device_asked(read_config("demo"), "much", 1, True)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"), (3.04, "3.0 s"), (100.4, "100 s"), (150, "2.5 min"), (9000, "2.5 h"), (9e7, "1,042 days"),
        (float("nan"), "unknown"),
    ],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert time_words(seconds) == words


# -- in a run ---------------------------------------------------------------------------------------------------------


def machine_with(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    """From now on every device has so much."""
    monkeypatch.setattr(memory.Device, "of", lambda place: Device("cpu", gigabytes * GB, bfloat16=False))


WIDE = (*ONE_ROUND, "align.precision=float32", "align.micro_batch_size=6", "align.batch_size=6", "align.epochs=2")


def memory_for(config: Config, at_once: int) -> float:
    """GB in which the training just fits with so many pairs of 45 tokens at a time."""
    shape = Shape.read(config.model.name)
    training = replace(TrainingSettings.of(config.align, config.seed), at_once=at_once)
    return total_bytes(align_need(shape, Device("cpu", None, bfloat16=False), training, 45)) * MARGIN / GB


@pytest.mark.slow
def test_a_run_is_made_to_fit_and_says_so(tmp_path, monkeypatch):
    path = write_world(tmp_path)
    config = read_config(path, WIDE)
    records, logs, keys = {}, {}, {}
    for name, gigabytes in (("roomy", 1.0), ("tight", memory_for(config, 1) + 0.0005)):
        machine_with(monkeypatch, gigabytes)
        watch = execute(config, tmp_path / name)
        folder = tmp_path / name / "T1" / "align"
        records[name], keys[name] = read_json(folder / "memory.json"), read_json(folder / "done.json")["key"]
        logs[name] = read_lines(folder / "train.jsonl")
        early, then = map(str, watch.of("noted"))
        assert early.startswith("T1/align will need about ")
        assert then.startswith("T1/align needs about ")
        assert f"{records[name]['at_once'] or 6} pair" in then
    assert (records["roomy"]["changed"], records["roomy"]["at_once"]) == (False, 0)
    assert records["tight"]["changed"]
    assert 0 < records["tight"]["at_once"] < 6
    assert records["tight"]["at_once_in_the_end"] == records["tight"]["at_once"]
    # The machine's memory is no part of what a stage is, since the training is the same.
    assert keys["roomy"] == keys["tight"]
    for one, other in zip(logs["roomy"], logs["tight"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_what_can_never_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    config = write_world(tmp_path)
    machine_with(monkeypatch, 0.1)
    watch = Watch()
    with pytest.raises(InputError, match=r"T1/align needs .* even with 1 pair at a time and gradient checkpointing"):
        execute(config, tmp_path / "run", watch, changes=ONE_ROUND)
    assert watch.of("began") == ["data"]


def test_measuring_does_not_wait_for_a_training_that_fits(tmp_path, monkeypatch):
    config = write_world(tmp_path)
    machine_with(monkeypatch, 0.1)
    assert "T0/measure" in execute(config, tmp_path / "run", verb="measure", changes=ONE_ROUND).of("began")
    assert execute(config, tmp_path / "audit", changes=("align.rounds=0", "variants={}")).of("noted") == []


@pytest.mark.slow
def test_as_configured_is_done_as_configured(tmp_path, monkeypatch):
    config = write_world(tmp_path)
    machine_with(monkeypatch, 0.1)
    execute(config, tmp_path / "run", changes=(*ONE_ROUND, "align.fit_memory=false"))
    record = read_json(tmp_path / "run" / "T1" / "align" / "memory.json")
    assert (record["changed"], record["at_once"]) == (False, 0)


@pytest.mark.slow
def test_a_finished_run_says_nothing_again_and_may_change_how_it_fits(tmp_path):
    config = write_world(tmp_path)
    execute(config, tmp_path / "run", changes=ONE_ROUND)
    before = results(tmp_path / "run")
    again = execute(config, tmp_path / "run", changes=(*ONE_ROUND, "align.fit_memory=false"))
    assert again.of("noted") == []
    assert again.of("began") == []
    assert results(tmp_path / "run") == before
