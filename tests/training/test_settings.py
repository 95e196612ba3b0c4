"""The settings of a training: one set of defaults and checks, checkpoints that are whole, what a trainer patches."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from safeneuron.config.align import AlignTable
from safeneuron.config.toml import parse_config
from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.training.settings import (
    COMPLETE,
    TrainingSettings,
    Watch,
    arguments_of,
    is_sharded,
    last_checkpoint,
    model_restored,
    training_log,
)
from tests.helpers import tiny

ELSEWHERE = {"at_once", "seed"}
"""What the table [align] does not hold: the one is found out, the other is the run's."""


def test_the_defaults_are_those_of_the_config():
    assert TrainingSettings.of(AlignTable(), seed=0) == TrainingSettings()
    names = {field.name for field in fields(TrainingSettings)}
    assert names - set(AlignTable.model_fields) == ELSEWHERE


def test_a_table_hands_on_everything_that_it_says():
    text = (
        "[align]\nbeta = 0.3\nbatch_size = 6\nmicro_batch_size = 3\nlora_rank = 4\nlora_targets = 'ffn'\nsave_every = 7"
    )
    config = parse_config(f"seed = 5\n{text}\n[variants.other]\nepochs = 2", "x")
    settings = TrainingSettings.of(config.variant("other"), config.seed)
    assert settings == TrainingSettings(
        beta=0.3, batch_size=6, micro_batch_size=3, lora_rank=4, lora_targets="ffn", save_every=7, epochs=2, seed=5
    )


@pytest.mark.parametrize(
    ("changes", "noun"),
    [
        ({"batch_size": 3, "micro_batch_size": 2}, "micro_batch_size"),
        ({"precision": "bf16"}, "precision"),
        ({"lora_targets": "mlp"}, "lora_targets"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_values_that_cannot_be_used_are_named(changes, noun):
    with pytest.raises(InputError, match=noun) as error:
        TrainingSettings(**changes)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=noun):
        replace(TrainingSettings(), **changes)


def test_settings_are_named():
    with pytest.raises(TypeError):
        TrainingSettings(0.1)


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (3, None), (4, 3), (6, 2), (12, 1)])
def test_a_micro_batch_divides_the_share_of_each_process(monkeypatch, world, size):
    monkeypatch.setattr(distributed, "world", lambda: world)
    settings = TrainingSettings(batch_size=12 if world != 3 else 16, micro_batch_size=4)
    if size is None:
        with pytest.raises(InputError, match="processes"):
            settings.micro_batch()
    else:
        assert settings.micro_batch() == {2: 3}.get(world, size)


def test_steps_are_counted_over_all_epochs_and_never_none():
    assert TrainingSettings(epochs=3, batch_size=8, micro_batch_size=8).steps(100) == 38
    assert TrainingSettings(epochs=0.1).steps(4) == 1


def test_what_trl_is_told(tmp_path):
    settings = TrainingSettings(batch_size=8, micro_batch_size=2, sft_weight=0.5, precision="float32", save_every=3)
    arguments = arguments_of(settings, 80, torch.device("cpu"), tmp_path, save=True)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)
    assert (arguments.max_steps, arguments.warmup_steps) == (30, 3)
    assert (arguments.loss_type, arguments.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 3)
    assert arguments.mixed_precision == "no"
    assert arguments_of(settings, 80, torch.device("cpu"), tmp_path, save=False).save_strategy == "no"


def test_one_process_shares_no_weights(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_sharded()


def test_only_whole_checkpoints_count_and_the_others_are_removed(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()
    with pytest.raises(InputError, match="FSDP2"):
        last_checkpoint(tmp_path, sharded=True)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_training_that_diverges_is_stopped(tmp_path, name):
    watch, state = Watch(tmp_path, None), SimpleNamespace(global_step=3)
    watch.on_log(None, state, None, logs={name: 1.0})
    with pytest.raises(InputError, match=name):
        watch.on_log(None, state, None, logs={name: float("nan")})


def test_progress_is_told_and_the_last_step_saves_no_checkpoint(tmp_path):
    calls: list[tuple[int, int]] = []
    watch = Watch(tmp_path, lambda done, total: calls.append((done, total)))
    for step in (1, 2):
        control = SimpleNamespace(should_save=True)
        watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=2), control)
        assert control.should_save == (step == 1)
    assert calls == [(1, 2), (2, 2)]


def test_what_a_trainer_leaves_on_a_model_is_taken_off_again():
    network = tiny.network()
    cache, attributes = network.config.use_cache, set(vars(network))
    with model_restored(network):
        network.train()
        network.config.use_cache = not cache
        network.something = 1
    assert (network.config.use_cache, set(vars(network)), network.training) == (cache, attributes, False)


def test_the_log_has_one_record_a_step():
    history = [{"step": 1, "loss": 0.7, "rewards/margins": 0.2}, {"step": 1, "train_runtime": 3.0}]
    (record,) = training_log(history)
    assert record == {
        "step": 1, "loss": 0.7, "accuracy": 0.0, "margin": 0.2, "grad_norm": 0.0, "learning_rate": 0.0, "padding": 0.0,
    }  # fmt: skip
