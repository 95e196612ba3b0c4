"""``FreezeNeurons`` in every trainer: what is frozen stays bit for bit, also through resumed training; the rest moves.

The product {trainer x precision x clipping x decay x accumulation x resume x optimizer x gradient checkpointing} has
4,032 combinations. ``MATRIX`` is a part of it that has every pair of settings, some thirty combinations, found greedily
and always the same. Several devices and LoRA have tests of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import BEMACallback

from safeneuron.errors import InputError
from safeneuron.neurons.layout import fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training.freezing import FreezeNeurons
from tests.helpers import tiny
from tests.helpers.frozen_checks import (
    add_noise,
    assert_frozen_stayed,
    assert_only_frozen_stayed,
    frozen_entries,
    network_with_noise,
    snapshot,
    some_neurons,
)
from tests.helpers.tiny_trainers import TRAINERS, classifier_of, plain_trainer

FACTORS = {
    "trainer": tuple(TRAINERS),
    "precision": ("float32", "bfloat16 autocast", "float16 autocast", "bfloat16 weights"),
    "clipping": ("clipped", "unclipped"),
    "decay": ("decay", "no decay"),
    "accumulation": ("one batch", "two batches"),
    "resume": ("in one go", "resumed"),
    "optimizer": ("adamw_torch", "adamw_torch_fused", "adafactor"),
    "checkpointing": ("no checkpointing", "reentrant", "not reentrant"),
}


def pairs_of(row: Mapping[str, str]) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(sorted(row.items()), 2))


def covering() -> list[dict[str, str]]:
    """Rows that have every pair of values: each starts at a pair that is missing and adds as many others as it can."""
    missing = {
        tuple(sorted(((a, x), (b, y)))): None
        for a, b in combinations(FACTORS, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in (name for name in FACTORS if name not in row):
            row[name] = max(FACTORS[name], key=lambda value: len(pairs_of({**row, name: value}) & missing.keys()))
        rows.append({name: row[name] for name in FACTORS})
        for pair in pairs_of(row):
            missing.pop(pair, None)
    return rows


MATRIX = covering()


def test_matrix_has_every_pair_of_settings():
    covered = set().union(*map(pairs_of, MATRIX))
    wanted = sum(len(FACTORS[a]) * len(FACTORS[b]) for a, b in combinations(FACTORS, 2))
    assert len(covered) == wanted
    assert len(MATRIX) < 50


def settings_of(row: Mapping[str, str]) -> dict[str, object]:
    return {
        "bf16": row["precision"] == "bfloat16 autocast",
        "fp16": row["precision"] == "float16 autocast",
        "max_grad_norm": 0.5 if row["clipping"] == "clipped" else 0.0,
        "weight_decay": 0.1 if row["decay"] == "decay" else 0.0,
        "gradient_accumulation_steps": 2 if row["accumulation"] == "two batches" else 1,
        "optim": row["optimizer"],
        "gradient_checkpointing": row["checkpointing"] != "no checkpointing",
        "gradient_checkpointing_kwargs": {"use_reentrant": row["checkpointing"] == "reentrant"},
    }


def network_for(row: Mapping[str, str], seed: int = 0) -> nn.Module:
    network = network_with_noise(seed=seed)
    if row["trainer"] == "reward":
        network = classifier_of(network)
    return network.to(torch.bfloat16) if row["precision"] == "bfloat16 weights" else network


def scale_loss(trainer: Trainer, scaler: torch.amp.GradScaler) -> Trainer:
    """Make accelerate do on the CPU what it does for float16 on a GPU only; here it would compute in float32."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = scaler
    return trainer


def trainer_for(row: Mapping[str, str], network: nn.Module, folder: Path, **changes: object) -> Trainer:
    # The neurons are those of the language model, also where a reward model is trained.
    callback = FreezeNeurons(some_neurons(network_with_noise()))
    trainer = TRAINERS[row["trainer"]](network, folder, [callback], **settings_of(row), **changes)
    return scale_loss(trainer, torch.amp.GradScaler("cpu")) if row["precision"] == "float16 autocast" else trainer


# One row of each trainer is fast.
FAST = list({row["trainer"]: row for row in MATRIX}.values())
ROWS = [row if row in FAST else pytest.param(row, marks=pytest.mark.slow) for row in MATRIX]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_frozen_stays_and_the_rest_moves(row, tmp_path):
    network = network_for(row)
    before = snapshot(network)
    if row["resume"] == "resumed":
        trainer_for(row, network, tmp_path, max_steps=2).train()
        # All that the second start knows of the first must be in the checkpoint.
        network = network_for(row, seed=1)
        trainer = trainer_for(row, network, tmp_path)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    else:
        trainer = trainer_for(row, network, tmp_path)
        trainer.train()
    assert trainer.state.global_step == 4
    # Decay moves what has no gradient, unless the step is lost in the rounding of short weights.
    everywhere = row["decay"] == "decay" and row["precision"] != "bfloat16 weights"
    assert_only_frozen_stayed(before, network, every_entry=everywhere)


class Skipped(TrainerCallback):
    """In which steps the loss scaler threw the gradients away, so that the weights did not move."""

    def __init__(self) -> None:
        self.steps: list[bool] = []

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.steps.append(optimizer.step_was_skipped)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor"])
def test_float16_with_a_step_that_is_skipped(optimizer, tmp_path):
    network = network_with_noise()
    before, skipped = snapshot(network), Skipped()
    callbacks = [FreezeNeurons(some_neurons(network)), skipped]
    trainer = plain_trainer(network, tmp_path, callbacks, bf16=False, fp16=True, optim=optimizer)
    # So far that the gradients overflow in the first step, and in no other.
    scale_loss(trainer, torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30))
    trainer.train()
    assert skipped.steps == [True, False, False, False]
    assert_only_frozen_stayed(before, network)


# -- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
def test_optimizer_with_8_bit_states(optimizer, tmp_path):
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers need bitsandbytes, which is not installed")
    network = network_with_noise()
    before = snapshot(network)
    # Three steps, because Lion's are all of one size, so that an even number may end where it began.
    trainer = plain_trainer(network, tmp_path, [FreezeNeurons(some_neurons(network))], optim=optimizer, max_steps=3)
    trainer.train()
    states = [state["state1"].dtype for state in trainer.optimizer.state.values()]
    assert torch.uint8 in states, "no parameter is large enough for an 8-bit state"
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize("trainable", [True, False], ids=["all trainable", "one projection not trainable"])
def test_optimizer_of_the_user_with_two_groups(trainable, tmp_path):
    network = network_with_noise()
    fixed = network.get_decoder().layers[0].mlp.up_proj.weight.requires_grad_(trainable)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    norms = [parameter for name, parameter in trained.items() if "norm" in name]
    rest = [parameter for name, parameter in trained.items() if "norm" not in name]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1, "lr": 3e-3}]
    before = snapshot(network)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    plain_trainer(network, tmp_path, [FreezeNeurons(some_neurons(network))], optimizers=(optimizer, None)).train()
    assert torch.equal(fixed, before["model.layers.0.mlp.up_proj.weight"]) != trainable
    assert_frozen_stayed(before, network)
    masks = frozen_entries(before)
    assert all((parameter != before[name])[~masks[name]].float().mean() > 0.99 for name, parameter in trained.items())


# -- compiled models --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("who", ["compiled by the trainer", "compiled by the user"])
def test_compiled_model(who, tmp_path):
    network = network_with_noise()
    before = snapshot(network)
    # Without the code generator, which takes a minute: the graph and its backward pass are the compiled ones.
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if who == "compiled by the trainer" else {}
    given = network if settings else torch.compile(network, backend="aot_eager")
    callback = FreezeNeurons(some_neurons(network))
    trainer = plain_trainer(
        given, tmp_path, [callback], gradient_checkpointing=False, remove_unused_columns=False, **settings
    )
    trainer.train()
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    assert_only_frozen_stayed(before, network)


# -- resumed training -------------------------------------------------------------------------------------------


def first_half(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """Two steps with a checkpoint after each; returns the weights at the start."""
    network = network_with_noise()
    before = snapshot(network)
    callback = FreezeNeurons(some_neurons(network))
    plain_trainer(network, folder, [callback], max_steps=2, save_steps=1, **changes).train()
    return before


def second_half(folder: Path, network: nn.Module, callbacks: list[TrainerCallback], **changes: object) -> None:
    trainer = plain_trainer(network, folder, callbacks, **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4


def neurons_of_the_first() -> NeuronSet:
    return some_neurons(network_with_noise())


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    before = first_half(tmp_path / "halves")
    halves, whole = network_with_noise(seed=1), network_with_noise()
    second_half(tmp_path / "halves", halves, [FreezeNeurons(neurons_of_the_first())])
    plain_trainer(whole, tmp_path / "whole", [FreezeNeurons(neurons_of_the_first())]).train()
    assert_only_frozen_stayed(before, halves)
    assert all(torch.equal(whole.get_parameter(name), value) for name, value in halves.named_parameters())
    assert fingerprint(halves) == neurons_of_the_first().fingerprint


def test_callbacks_can_be_restored_too(tmp_path):
    before, network = first_half(tmp_path), network_with_noise(seed=1)
    callbacks = [FreezeNeurons(neurons_of_the_first())]
    second_half(tmp_path, network, callbacks, restore_callback_states_from_checkpoint=True)
    assert_only_frozen_stayed(before, network)


def test_two_sets_at_once_are_told_apart(tmp_path):
    network = network_with_noise()
    before, known_as, widths = snapshot(network), fingerprint(network), widths_of(network)
    sets = [neurons_of_the_first(), NeuronSet.of({1: [5]}, widths, known_as)]
    callbacks = [FreezeNeurons(neurons) for neurons in sets]
    plain_trainer(network, tmp_path, callbacks, max_steps=2).train()
    network = network_with_noise(seed=1)
    second_half(tmp_path, network, [FreezeNeurons(neurons) for neurons in reversed(sets)])
    assert_frozen_stayed(before, network)
    assert torch.equal(network.model.layers[1].mlp.up_proj.weight[5], before["model.layers.1.mlp.up_proj.weight"][5])


@pytest.mark.parametrize("where", ["a frozen entry", "a free entry"])
def test_checkpoint_whose_frozen_neurons_have_moved_is_refused(where, tmp_path):
    first_half(tmp_path)
    path, name = tmp_path / "checkpoint-2" / "model.safetensors", "model.layers.2.mlp.down_proj.weight"
    weights = load_file(path)
    mask = frozen_entries(weights)[name]
    entry = (mask if where == "a frozen entry" else ~mask).nonzero()[0].tolist()
    weights[name][entry[0], entry[1]] += 1e-6
    save_file(weights, path, {"format": "pt"})
    callbacks = [FreezeNeurons(neurons_of_the_first())]
    if where == "a free entry":
        second_half(tmp_path, network_with_noise(), callbacks)
    else:
        with pytest.raises(InputError, match=r"checkpoint of step 2 are not those of the first start.*earlier check"):
            second_half(tmp_path, network_with_noise(), callbacks)


def test_checkpoint_in_another_precision_is_refused(tmp_path):
    first_half(tmp_path)
    with pytest.raises(InputError, match=r"not those of the first start.*precision that it was started in"):
        second_half(tmp_path, network_with_noise().to(torch.bfloat16), [FreezeNeurons(neurons_of_the_first())])


def test_checkpoint_of_a_training_without_these_neurons_is_refused(tmp_path):
    first = neurons_of_the_first()
    more = first | NeuronSet.of({1: [5]}, first.widths, first.fingerprint)
    first_half(tmp_path / "with others")
    plain_trainer(network_with_noise(), tmp_path / "without", [], max_steps=2).train()
    for folder in (tmp_path / "with others", tmp_path / "without"):
        with pytest.raises(InputError, match=r"step 2 was not trained with these 5 neurons frozen"):
            second_half(folder, network_with_noise(), [FreezeNeurons(more)])


def test_resumed_from_a_wrong_model_is_refused(tmp_path):
    """The lineage comes from the checkpoint, and a set of another model must not profit from that."""
    first_half(tmp_path)
    with pytest.raises(InputError, match="was not trained with these"):
        second_half(tmp_path, network_with_noise(), [FreezeNeurons(some_neurons(tiny.network(seed=1)))])


def test_checkpoint_keeps_a_digest_and_no_weights(tmp_path):
    first_half(tmp_path)
    notes = [
        json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["stateful_callbacks"]
        for step in (1, 2)
    ]
    (first, second) = [{name: note for name, note in each.items() if "safeneuron" in name} for each in notes]
    assert first == second
    assert [len(digest) for digest in first.values()] == [64]


def test_best_model_at_the_end(tmp_path):
    network = network_with_noise()
    before = snapshot(network)
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05}
    # The loss falls, and the best is called the one where it is high: the first checkpoint.
    best = {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = plain_trainer(network, tmp_path, [FreezeNeurons(some_neurons(network))], **settings, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in network.named_parameters())
    assert_only_frozen_stayed(before, network)


# -- averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1], ids=["freeze first", "average first"])
@pytest.mark.parametrize("declared", [True, False])
def test_average_of_the_weights_is_exact_where_it_is_declared(declared, order, tmp_path):
    network = network_with_noise()
    before = snapshot(network)
    average = BEMACallback(update_freq=1, update_after=0)
    freeze = FreezeNeurons(some_neurons(network), averages=[average] if declared else [])
    plain_trainer(network, tmp_path, [freeze, average][::order], max_steps=3).train()
    assert_only_frozen_stayed(before, network)
    saved = load_file(tmp_path / "bema" / "model.safetensors")
    if declared:
        assert_only_frozen_stayed(before, saved)
    else:
        # Why it has to be declared; if this fails, the average has become exact by itself.
        with pytest.raises(AssertionError, match="a frozen entry moved"):
            assert_frozen_stayed(before, saved)
        freeze.freeze.restore_in(average.running_model)
        assert_only_frozen_stayed(before, average.running_model)


def test_noise_makes_no_weight_zero():
    """On this rests that decay moves every weight."""
    assert all((parameter != 0).all() for parameter in add_noise(tiny.network()).parameters())
