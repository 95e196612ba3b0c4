"""From a config to what its stages take: counted against a run that is done, printed for a model that is not here."""

from __future__ import annotations

import shlex
import time

import pytest
from typer.testing import CliRunner

from safeneuron.cli.app import app
from safeneuron.config.states import BASE, states_of
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.planning.duration import ROWS, Clock, Speed, clock_for, jobs, streams, table_of_times
from safeneuron.planning.memory import GB, Device
from safeneuron.planning.plan import ModelSpec, device_asked
from safeneuron.runs.attackers import kinds_answered
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_lines
from tests import ROOT
from tests.helpers.tiny_run import execute, write_world
from tests.planning.test_memory import seventy_billion

CPU = Device("cpu", None, bfloat16=False)


def clock_of(config, device: Device = CPU) -> Clock:
    return Clock(ModelSpec.of(config, words=True), device, Speed(1e9, 1e9), Speed(1e9, 1e9))


def test_as_many_answers_are_counted_as_a_run_gives(tmp_path):
    path = write_world(tmp_path)
    extra = ('attack.attempts=["base64"]', 'attack.selectors=["wanda"]', 'attack.operators=["mean"]')
    changes = ["variants={}", "align.rounds=1", *extra]
    for verb in ("measure", "select", "attack"):
        execute(path, tmp_path / "run", verb=verb, changes=changes)
    for change in ("always", "unpruned", "never"):
        config = read_config(path, [*changes, f'attack.over_refusal="{change}"'])
        prunings = Findings(config, Run.open(tmp_path / "run")).prunings(BASE)
        kinds = [kind for pruning in prunings for kind in kinds_answered(pruning, config.attack)]
        assert streams(config.attack, BASE) == (kinds.count("harmful"), kinds.count("benign")), change


def test_prompts_and_pairs_are_counted_as_a_run_uses_them(tmp_path):
    config = read_config(write_world(tmp_path))
    clock = clock_of(config)
    found = {job.stage: job for job in jobs(config, clock)}
    assert list(found) == ["measure", "iterate", "attack T0", "attack", "align", "align dpo"]
    assert [job.times for job in found.values()] == [4, 4, 1, 3, 2, 1]
    assert found["measure"].work.startswith("12 prompts of ")
    assert found["iterate"].seconds == pytest.approx(found["measure"].seconds)
    assert found["align"].work.startswith("1.5 x 6 pairs of 2 x ")
    assert not clock.fetched


def test_on_policy_pairs_and_their_mixture(tmp_path):
    changes = ("pairs.safety='on-policy'", "pairs.general='on-policy'", "pairs.safety_share=0.25", "pairs.count=8")
    world = write_world(tmp_path)
    own = [f"pairs.{kind}=[{{path='{tmp_path}/{kind}.jsonl'}}]" for kind in ("unsafe", "safe")]
    config = read_config(world, [*changes, *own])
    found = {job.stage: job for job in jobs(config, clock_of(config))}
    # Twice the harmful ones, pruned and intact, and once the harmless ones.
    assert found["pairs"].work == "18 answers of 128 tokens"
    assert "x 8 pairs" in found["align"].work


def test_refresh_and_many_devices_are_in_the_time(tmp_path):
    changes = ["variants.again={refresh=1,ablate=false}"]
    config = read_config(write_world(tmp_path), changes)
    one = {job.stage: job.seconds for job in jobs(config, clock_of(config))}
    assert one["align again"] > one["align"]
    two = {job.stage: job.seconds for job in jobs(config, clock_of(config, Device("cpu", None, False, 2)))}
    assert two == {stage: pytest.approx(seconds / 2) for stage, seconds in one.items()}


def test_tokens_are_those_of_the_models_own_tokenizer(tmp_path):
    config = read_config(write_world(tmp_path))
    clock = clock_of(config)
    amount = clock.prompts(config.data.unsafe, 1000)
    records = read_lines(tmp_path / "unsafe.jsonl")
    # A byte is a token here; the template adds the marks.
    assert amount.length == sum(len(record["prompt"]) for record in records) / 6 + 3


def test_what_has_yet_to_be_fetched_is_guessed_and_said():
    config = read_config("paper-llama", ['model.name="embedded"', "data.test_unsafe=[{path='strongreject'}]"])
    clock = clock_of(config)
    lines = table_of_times(config, clock)
    assert clock.prompts(config.data.test_unsafe, 2000).number == ROWS
    assert any(line.startswith("guessed") and "strongreject" in line for line in lines)
    # The pairs that are asked for are taken to be there.
    assert any("3 x 55,000 pairs" in line for line in lines)


def test_a_large_model_is_timed_without_weights_in_seconds(tmp_path):
    config = read_config("paper-llama", [f'model.name="{seventy_billion(tmp_path)}"'])
    begun = time.process_time()
    device = device_asked(config, "80GB", 8, sharded=True)
    paper = ModelSpec.of(config, words=True)
    clock = clock_for(config, paper, device, 400e12, "3.3TB", here=False)
    lines = table_of_times(config, clock)
    assert time.process_time() - begun < 10
    assert lines[0] == "time, from full speed (400 TFLOP/s and 3.3 TB/s on each of 8 devices) to a quarter of it"
    training = next(job for job in jobs(config, clock) if job.stage == "align")
    # Three epochs, a pass forward again for each layer, and the reference: 13 times 2 P T; and 10,313 steps of AdamW.
    computing, moving = 13 * 2 * 70.5e9 * (2 * 55_000 * 256) / 400e12, 10_313 * 40 * 70.5e9 / 3.3e12
    assert training.seconds == pytest.approx((computing + moving) / 8, rel=0.05)


def test_layers_that_wait_elsewhere_are_said(tmp_path):
    changes = [f'model.name="{seventy_billion(tmp_path)}"', "align.rounds=0", "variants={}", 'model.device_map="auto"']
    config = read_config("paper-llama", changes)
    clock = clock_of(config, Device("cuda", 80 * GB, bfloat16=True))
    (told,) = (line for line in table_of_times(config, clock) if "model.device_map" in line)
    assert told.startswith("each pass also moves 64 GB to the device")


def test_a_speed_is_two_figures(tmp_path):
    config = read_config("default")
    for flops, bandwidth in ((1e12, ""), (0.0, "1TB")):
        with pytest.raises(InputError, match="--device-flops and --device-bandwidth, and one of them was given"):
            clock_for(config, ModelSpec.of(config), CPU, flops, bandwidth, here=True)
    assert clock_for(config, ModelSpec.of(config), CPU, 0.0, "", here=False) is None


def test_base_is_attacked_by_fewer():
    table = read_config("demo").attack
    assert streams(table, BASE) == (5, 5)
    assert streams(table, states_of(read_config("demo"))[1]) == (8, 8)


def test_the_print_in_the_documentation_is_the_commands_own(tmp_path, monkeypatch):
    """And takes seconds, with no weights to read."""
    seventy_billion(tmp_path / "llama-70b")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    command, *printed = page.partition("$ safeneuron ")[2].partition("\n```")[0].splitlines()
    begun = time.process_time()
    result = CliRunner().invoke(app, shlex.split(command))
    assert time.process_time() - begun < 10
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == printed
