"""LoRA beside frozen neurons: the merged model's frozen slices are the base model's, all else of the adapters moves."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import LINEAGE, fingerprint, network_of, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runtime.files import read_json
from safeneuron.training.ablation import Refresh
from safeneuron.training.alignment import Alignment, align
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from safeneuron.training.lora import adapter_slices, adapters_of, lora_config, merge_adapters
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny
from tests.helpers.frozen_checks import (
    CHANNELS,
    assert_frozen_stayed,
    assert_only_frozen_stayed,
    frozen_entries,
    network_with_noise,
    snapshot,
    some_neurons,
)
from tests.helpers.tiny_run import execute, write_world
from tests.helpers.tiny_trainers import arguments, message, pairs
from tests.programs import adapters_worker
from tests.training.test_alignment import (
    LN2,
    PAIRS,
    assert_frozen_alone,
    assert_same_result,
    assert_same_state,
    chosen_neurons,
    dpo_loss,
    interrupt_at,
    many_neurons,
    run,
    state_of,
)
from tests.training.test_freezing import hooks_on, loss_of
from tests.training.test_freezing_devices import assert_passed, outcomes

ALL = "all-linear"
KINDS: dict[str, dict[str, object]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
}


def adapted(network: nn.Module, **changes: object) -> PeftModel:
    return get_peft_model(network, LoraConfig(**{"r": 4, "target_modules": ALL, **changes}))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, mode: str = "plain", accumulate: int = 2
) -> None:
    """Steps with accumulated and clipped gradients; in the first one A has none, because B is zero."""
    for step in range(steps):
        for part in range(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bfloat16 autocast"):
                loss = loss_of(model, 10 * step + part) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def owned_adapter_entries(model: PeftModel) -> dict[str, Tensor]:
    """Which entries of each trainable parameter the neurons of ``CHANNELS`` own, the slow and obvious way."""
    masks = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
    for layer, channels in CHANNELS.items():
        for name, mask in masks.items():
            place, _, part = name.partition(f"layers.{layer}.mlp.")[2].partition(".")
            rows = {"gate_proj": [0], "up_proj": [0], "gate_up_proj": [0, tiny.WIDTH]}.get(place, [])
            for channel in channels:
                if "lora_B" in part or part.startswith("base_layer"):
                    mask[[first + channel for first in rows]] = True
                elif "lora_A" in part and place == "down_proj":
                    mask[:, channel] = True
    return masks


# -- the seam -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_seam_sees_through_peft(family):
    network = network_with_noise(family)
    base, neurons = copy.deepcopy(network), some_neurons(network)
    model = adapted(network, init_lora_weights=False)
    assert network_of(model) is network
    assert (fingerprint(model), widths_of(model)) == (fingerprint(base), widths_of(base))
    plain, wrapped = owned_slices(base, neurons), owned_slices(model, neurons)
    assert [piece.name.replace(".base_layer", "") for piece in wrapped] == [piece.name for piece in plain]
    assert all(network.get_parameter(piece.name) is piece.parameter for piece in wrapped)
    ids = torch.arange(4, 20)[None]
    merged = copy.deepcopy(model).merge_and_unload()
    with recorded(model) as recording, torch.no_grad():
        model(input_ids=ids)
    with recorded(merged) as expected, torch.no_grad():
        merged(input_ids=ids)
    for layer in range(tiny.LAYERS):
        torch.testing.assert_close(recording.layers[layer], expected.layers[layer], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_pruned_neurons_are_zero_for_the_weights_and_for_the_adapters(family):
    """The same as zero columns in both, which is a zero column of the merged matrix."""
    model = adapted(network_with_noise(family), init_lora_weights=False).eval()
    neurons, ids = some_neurons(model), torch.arange(4, 20)[None]
    merged = copy.deepcopy(model).merge_and_unload()
    for layer, channels in CHANNELS.items():
        merged.get_decoder().layers[layer].mlp.down_proj.weight.data[:, channels] = 0
    with torch.no_grad(), pruned(model, neurons):
        scores = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    torch.testing.assert_close(scores, merged(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    base = model.unload()
    with torch.no_grad(), pruned(base, neurons):
        torch.testing.assert_close(without, base(input_ids=ids).logits)
    assert hooks_on(base) == 0


# -- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "bfloat16 autocast", "gradient checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_merged_frozen_slices_are_the_base_models_and_all_else_moves(family, kind, mode):
    network = network_with_noise(family, **({"mlp_bias": True} if "bias" in kind and family == "llama" else {}))
    before, neurons = snapshot(network), some_neurons(network)
    if kind == "bias":  # PEFT cannot merge a bias into layers without one.
        targets = ["gate_proj", "up_proj", "down_proj"] if family == "llama" else ["gate_up_proj", "down_proj"]
        model = adapted(network, target_modules=targets, **KINDS[kind])
    else:
        model = adapted(network, **KINDS[kind])
    if mode == "gradient checkpointing":
        network.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer):
        train(model, optimizer, mode=mode)
    masks = owned_adapter_entries(model)
    assert sum(int(mask.sum()) for mask in masks.values()) >= 4 * 3 * 4
    for name, mask in masks.items():
        after = model.get_parameter(name).detach()
        expected = start[name][mask] if "base_layer" in name else torch.zeros(int(mask.sum()))
        assert torch.equal(after[mask], expected), f"{name}: a frozen entry is not what it was"
        assert (after != start[name])[~mask].all(), f"{name}: a free entry did not move"
    if kind == "bias" and family == "phi3":
        return  # Nothing of this family has biases, so this adapter cannot be merged.
    merged = model.merge_and_unload()
    assert_frozen_stayed(before, snapshot(merged))
    targeted = {name.replace(".base_layer", "") for name in start if "base_layer.weight" in name}
    after = snapshot(merged)
    assert_only_frozen_stayed(
        *({n.removeprefix("base_model.model."): w for n, w in weights.items() if f"base_model.model.{n}" in targeted}
          for weights in (before, after))
    )  # fmt: skip


def test_to_begin_to_freeze_changes_nothing_that_is_computed():
    model = adapted(network_with_noise())
    before = loss_of(model, 0)
    Freeze(model, some_neurons(model))
    assert torch.equal(loss_of(model, 0), before)
    columns = model.base_model.model.model.layers[2].mlp.down_proj.lora_A["default"].weight
    assert (columns[:, CHANNELS[2]] == 0).all()
    assert (columns != 0).sum() == columns.numel() - columns.shape[0] * len(CHANNELS[2])


def test_without_the_mask_or_the_zeros_it_would_not_hold(monkeypatch):
    network = network_with_noise()
    before, neurons = snapshot(network), some_neurons(network)
    monkeypatch.setattr("safeneuron.training.freezing.adapter_slices", lambda *_: [])
    model = adapted(network)
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer):  # The base weights alone do stay.
        train(model, optimizer)
    with pytest.raises(AssertionError, match="a frozen entry moved"):
        assert_frozen_stayed(before, snapshot(model.merge_and_unload()))


def test_the_signs_of_zeros_are_kept():
    network = network_with_noise()
    neurons = some_neurons(network)
    with torch.no_grad():
        network.model.layers[2].mlp.up_proj.weight[3] = -0.0
        network.model.layers[2].mlp.up_proj.weight[5] = -0.0
    proof = Freeze(copy.deepcopy(network), neurons)
    model = adapted(network)
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer):
        train(model, optimizer)
    proof.network = merge_adapters(model)
    assert proof.changed() == []
    weight = proof.network.model.layers[2].mlp.up_proj.weight
    assert torch.signbit(weight[3]).all()
    assert (weight[5] != 0).all()


def test_adapters_on_the_attention_alone_leave_the_neurons_alone():
    network = network_with_noise()
    before, neurons = snapshot(network), some_neurons(network)
    model = adapted(network, target_modules=["q_proj", "v_proj"], use_dora=True)  # There, anything goes.
    assert adapter_slices(model, neurons) == []
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer):
        train(model, optimizer)
    after = snapshot(model.merge_and_unload())
    assert_frozen_stayed(before, after)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("place", ["mlp", "down_proj", "up_proj"])
def test_modules_that_are_trained_in_full_are_frozen_in_their_copies(place):
    network = network_with_noise()
    before, neurons = snapshot(network), some_neurons(network)
    model = adapted(network, target_modules=["q_proj"], modules_to_save=[place])
    assert fingerprint(model) == neurons.fingerprint
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer) as freeze:
        assert any(f"{place}.modules_to_save.default" in piece.name for piece in freeze.slices)
        train(model, optimizer, steps=2)
    for name, parameter in model.named_parameters():  # What the copies were made of has not been touched.
        if "original_module" in name:
            plain = name.removeprefix("base_model.model.").replace(".original_module", "")
            assert torch.equal(parameter, before[plain])
    after = snapshot(model.merge_and_unload())
    trained = {name for name in before if f".{place}." in name}
    assert_frozen_stayed(before, after)
    if place == "mlp":
        assert_only_frozen_stayed({name: before[name] for name in trained}, {name: after[name] for name in trained})
    assert all(not torch.equal(before[name], after[name]) for name in trained)


# -- trainers -----------------------------------------------------------------------------------------------------


def sft_trainer(network: nn.Module, folder: Path, callback: FreezeNeurons, **more: object) -> Trainer:
    rows = Dataset.from_list([{"messages": message("user", f"say {i}") + message("assistant", "no")} for i in range(8)])
    return SFTTrainer(
        model=network,
        args=arguments(SFTConfig, folder, max_length=32, logging_steps=1),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        **more,
    )


def dpo_trainer(network: nn.Module, folder: Path, callback: FreezeNeurons, **more: object) -> Trainer:
    return DPOTrainer(
        model=network,
        args=arguments(DPOConfig, folder, max_length=32, logging_steps=1),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        **more,
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_one_line_in_a_trainer_with_peft_config(make, family, tmp_path):
    network = network_with_noise(family)
    base, before, neurons = copy.deepcopy(network), snapshot(network), some_neurons(network)
    callback = FreezeNeurons(neurons)
    trainer = make(network, tmp_path, callback, peft_config=LoraConfig(r=4, target_modules=ALL))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    callback.freeze.verify()
    merged = trainer.model.merge_and_unload()
    assert_frozen_stayed(before, snapshot(merged))
    assert fingerprint(merged) == neurons.fingerprint
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    for reloaded in (copy.deepcopy(again).merge_and_unload(), merge_adapters(again)):
        after = snapshot(reloaded)
        assert_frozen_stayed(before, after)
        for name, weight in after.items():
            torch.testing.assert_close(weight, snapshot(merged)[name])
    assert fingerprint(reloaded) == neurons.fingerprint, "only merge_adapters can still know it"
    assert fingerprint(base) == neurons.fingerprint


def test_resumed_training_ends_as_if_it_had_not_stopped(tmp_path):
    results = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        network = network_with_noise()
        before, callback = snapshot(network), FreezeNeurons(some_neurons(network))
        trainer = sft_trainer(network, folder, callback, peft_config=LoraConfig(r=4, target_modules=ALL))
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2") if results else None)
        results.append(snapshot(trainer.model.merge_and_unload()))
        assert_frozen_stayed(before, results[-1])
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_a_model_of_peft_with_its_reference_in_a_second_adapter(tmp_path):
    """TRL copies the first adapter into one named ref, with which it computes the reference."""
    network = network_with_noise()
    before, neurons = snapshot(network), some_neurons(network)
    model = adapted(network)
    trainer = dpo_trainer(model, tmp_path, FreezeNeurons(neurons))
    trainer.train()
    assert {"default", "ref"} <= set(model.peft_config)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-3)
    after, name = snapshot(model.merge_and_unload(adapter_names=["default"])), "model.layers.1.mlp.up_proj.weight"
    assert_frozen_stayed(before, after)
    assert not torch.equal(after[name], before[name])


def test_several_active_adapters_are_all_held():
    network = network_with_noise()
    before, neurons = snapshot(network), some_neurons(network)
    model = adapted(network)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    optimizer = adamw(model)
    with frozen(model, neurons, optimizer):
        train(model, optimizer)
    both = adapters_of(model)
    assert len({adapter.matrix for adapter in both}) < len(both)
    merged, ours = copy.deepcopy(model).merge_and_unload(), merge_adapters(model)
    for result in (snapshot(merged), snapshot(ours)):
        assert_frozen_stayed(before, result)
    for name, weight in snapshot(ours).items():
        torch.testing.assert_close(weight, snapshot(merged)[name])


def test_an_adapter_that_is_not_trained_stays_as_it_is():
    model = adapted(network_with_noise(), init_lora_weights=False)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj", "up_proj"]))
    model.set_adapter("second")
    idle = {name: value.clone() for name, value in model.named_parameters() if ".default." in name}
    optimizer = adamw(model)
    with frozen(model, some_neurons(model), optimizer):
        train(model, optimizer)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in idle.items())


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LoraConfig(r=4, target_modules=ALL, use_dora=True), "DoraLinearVariant"),
        (LoraConfig(r=4, target_modules=ALL, init_lora_weights="pissa"), "'pissa'"),
        (LoraConfig(r=4, target_modules=ALL, init_lora_weights="olora"), "'olora'"),
        (LoraConfig(r=4, target_modules=ALL, init_lora_weights="orthogonal"), "'orthogonal'"),
        (LoraConfig(r=4, target_modules=ALL, init_lora_weights="mica"), "MiCALinearVariant"),
        (LoraConfig(r=4, target_modules=ALL, alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "ALoraLinearVariant"),
        (AdaLoraConfig(target_modules=["up_proj"], total_step=10), "SVDLinear"),
        (IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), "IA3|ia3"),
        (LoraConfig(r=4, target_modules=[], target_parameters=["mlp.up_proj.weight"]), "ParamWrapper"),
    ],
    ids=["dora", "pissa", "olora", "orthogonal", "mica", "alora", "adalora", "ia3", "parameters"],
)
def test_adapters_that_change_whole_matrices_are_refused(config, found):
    model = get_peft_model(network_with_noise(), config)
    before, neurons = snapshot(model), some_neurons(model)
    with pytest.raises(InputError, match=f"not plain LoRA.*({found}).*expected peft.LoraConfig"):
        Freeze(model, neurons)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("part", ["rows", "columns", "bias"])
def test_an_adapter_that_has_already_changed_the_neurons_is_refused(part):
    network = network_with_noise(mlp_bias=True)
    neurons = some_neurons(network)
    model = adapted(network, target_modules=["up_proj", "down_proj"], lora_bias=True)
    mlp = network.model.layers[2].mlp
    with torch.no_grad():
        if part == "rows":
            mlp.up_proj.lora_B["default"].weight[3, 0] = 1e-6
        elif part == "columns":
            mlp.down_proj.lora_B["default"].weight[5, 0] = 1e-6
        else:
            mlp.up_proj.lora_B["default"].bias[3] = 1e-6
    before = snapshot(model)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.\w+\.lora_\w.* already changes neurons"):
        Freeze(model, neurons)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_adapter_that_was_trained_with_the_same_neurons_frozen_goes_on():
    model = adapted(network_with_noise())
    neurons, optimizer = some_neurons(model), adamw(model)
    with frozen(model, neurons, optimizer):
        train(model, optimizer)
    before = loss_of(model, 0)
    with frozen(model, neurons, optimizer):
        assert torch.equal(loss_of(model, 0), before)
        train(model, optimizer, steps=1)


def test_nothing_to_merge():
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_adapters(network_with_noise())


def test_a_bias_that_the_matrix_has_not_cannot_be_merged():
    model = adapted(network_with_noise(), target_modules=["up_proj"], lora_bias=True)
    with pytest.raises(InputError, match=r"has a bias for model\.layers\.0\.mlp\.up_proj"):
        merge_adapters(model)


# -- the settings of a training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("ffn", {"mlp"}),
        ("attention", {"self_attn"}),
        ("ffn+attention", {"mlp", "self_attn"}),
    ],
)
def test_targets_are_layers_of_the_decoder(family, targets, names):
    model = tiny.model(family)
    config = lora_config(model, TrainingSettings(lora_rank=3, lora_alpha=6, lora_dropout=0.5, lora_targets=targets))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.5)
    network = get_peft_model(copy.deepcopy(model.network), config)
    found = {adapter.matrix for adapter in adapters_of(network)}
    linear = {name for name, module in model.network.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in linear if "layers." in name and name.split(".")[3] in names}


# -- alignment with adapters --------------------------------------------------------------------------------------


def lora(model: Model, frozen: NeuronSet | None = None, **changes: object) -> Alignment:
    return run(model, frozen, **{"lora_rank": 4, "lora_alpha": 8, **changes})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["ffn", "attention", "ffn+attention"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_alignment_with_adapters(family, targets, precision):
    model = tiny.model(family)
    before = state_of(model.network)
    settings = {"lora_targets": targets, "precision": precision, "gradient_checkpointing": True}
    result = lora(model, chosen_neurons(model), **settings)
    assert_same_state(before, state_of(model.network))
    after = state_of(result.model.network)
    assert after["config"].pop(LINEAGE) == model.fingerprint
    assert_same_state(before, after, but=("weights",))
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=2e-3 if precision == "bfloat16" else 1e-6)
    assert result.frozen_identical
    assert result.frozen_count == 4
    assert result.frozen_sha256 == Freeze(result.model, chosen_neurons(model)).digest()
    old, new = snapshot(model.network), snapshot(result.model.network)
    assert_frozen_stayed(old, new)
    for name, weight in new.items():
        place = name.split(".")[3] if "layers." in name else ""
        adapted = {"mlp": "ffn", "self_attn": "attention"}.get(place, "nothing") in targets
        assert torch.equal(weight, old[name]) != adapted, name
    change = sum(float((new[name].double() - weight.double()).square().sum()) for name, weight in old.items())
    masks = frozen_entries(old)
    size = sum(float(weight[~masks[name]].double().square().sum()) for name, weight in old.items())
    assert result.free_change == pytest.approx((change / size) ** 0.5, rel=1e-5)


def test_the_merged_model_is_the_one_that_was_trained_and_the_reference_the_given_one():
    model = tiny.model()
    one, two = (lora(model, chosen_neurons(model), epochs=n, batch_size=8, micro_batch_size=4) for n in (1, 2))
    # The first step is the same in both, so the second loss is that of the first run's result.
    assert two.log[1]["loss"] == pytest.approx(dpo_loss(one.model, model), rel=1e-4)
    assert two.log[1]["loss"] < 0.69
    second = lora(one.model, chosen_neurons(model))
    assert second.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert_frozen_alone(model, second.model)


def test_dropout_of_the_adapters_acts():
    model = tiny.model()
    plain, dropped = (lora(model, lora_dropout=share, epochs=2) for share in (0.0, 0.5))
    assert plain.log[0] == dropped.log[0] or plain.log[0]["loss"] == dropped.log[0]["loss"]
    assert plain.log[1]["loss"] != dropped.log[1]["loss"]


def test_alignment_with_adapters_under_ablation():
    model = tiny.model()
    expected = dpo_loss(model, model, many_neurons(model))
    result = lora(model, ablated=many_neurons(model), batch_size=8, micro_batch_size=8)
    assert result.log[0]["loss"] == pytest.approx(expected, rel=1e-4)
    both = lora(model, ablated=many_neurons(model), ablate_reference=True, batch_size=8, micro_batch_size=8)
    assert both.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_refresh_with_adapters():
    """The neurons are found again on the model with its adapters, and ablated in both."""
    model, seen = tiny.model(), []

    def find(running: Model) -> list[NeuronSet]:
        seen.append((running.fingerprint, running.widths))
        with recorded(running) as recording, torch.no_grad():
            running.network(input_ids=torch.arange(4, 20)[None])
        assert set(recording.layers) == set(range(tiny.LAYERS))
        return [many_neurons(model)]

    settings = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "max_length": 64, "warmup_share": 0.0}
    training = TrainingSettings(**settings, learning_rate=1e-2, precision="float32", lora_rank=4)
    refresh = Refresh(find, every=1, share=1.0, kl_weight=0.0)
    result = align(model, PAIRS, chosen_neurons(model), training, refresh=refresh)
    assert seen == [(model.fingerprint, model.widths)] * 2
    assert result.log[0]["loss"] == pytest.approx(dpo_loss(model, model, many_neurons(model)), rel=1e-4)
    assert_frozen_alone(model, result.model)
    tied = align(
        model, PAIRS, chosen_neurons(model), training, refresh=Refresh(find, every=1, share=1.0, kl_weight=1.0)
    )
    assert tied.log[0]["loss"] > result.log[0]["loss"]


def test_nothing_but_some_neurons_is_trained_with_adapters():
    """SN-Tune: all others frozen, and all that belongs to no neuron."""
    model = tiny.model()
    mine = chosen_neurons(model)
    everything = NeuronSet.of(dict.fromkeys(range(tiny.LAYERS), range(tiny.WIDTH)), model.widths, model.fingerprint)
    settings = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "max_length": 64, "warmup_share": 0.0}
    training = TrainingSettings(**settings, learning_rate=1e-2, precision="float32", lora_rank=4, lora_targets="ffn")
    result = align(model, PAIRS, everything - mine, training, freeze_rest=True)
    before, after = snapshot(model.network), snapshot(result.model.network)
    for name, mask in frozen_entries(before).items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert (after[name] != before[name])[mask].all()
    with pytest.raises(InputError, match="expected lora_targets = 'ffn', found 'attention'; change it"):
        align(model, PAIRS, everything - mine, replace(training, lora_targets="attention"), freeze_rest=True)


@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_alignment_with_adapters_goes_on(step, tmp_path):
    model, seen = tiny.model(), []
    settings = {
        "ablated": many_neurons(model), "ablate_share": 0.5, "epochs": 2, "batch_size": 2, "micro_batch_size": 1,
        "lora_dropout": 0.1, "save_every": 2,
    }  # fmt: skip
    straight = lora(model, chosen_neurons(model), **settings)
    with pytest.raises(KeyboardInterrupt):
        lora(model, chosen_neurons(model), checkpoints=tmp_path, progress=interrupt_at(step), **settings)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert (checkpoint / "adapter_model.safetensors").exists()
        assert not (checkpoint / "model.safetensors").exists()
    again = lora(model, chosen_neurons(model), checkpoints=tmp_path, progress=interrupt_at(-1, seen), **settings)
    assert_same_result(again, straight)
    assert seen == list(range((step - 1) // 2 * 2 + 1, 9))


def test_a_bfloat16_checkpoint_is_the_base_in_bfloat16_and_keeps_its_frozen_weights(tmp_path, monkeypatch):
    base = tiny.model()
    base.network.to(torch.bfloat16)
    base.save(tmp_path / "base")
    given, model = load(tmp_path / "base", "bfloat16", "cpu"), load(tmp_path / "base", "float32", "cpu")
    trained_on = []

    def spy(policy: nn.Module, training: TrainingSettings) -> LoraConfig:
        trained_on.append(policy.dtype)
        return lora_config(policy, training)

    monkeypatch.setattr("safeneuron.training.alignment.lora_config", spy)
    result = lora(model, chosen_neurons(model), precision="bfloat16", epochs=2)
    lora(model, chosen_neurons(model), precision="float32")
    assert trained_on == [torch.bfloat16, torch.float32]
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=5e-3)
    assert result.model.network.dtype == torch.bfloat16
    result.model.save(tmp_path / "aligned")
    assert_frozen_alone(given, load(tmp_path / "aligned", "bfloat16", "cpu"))
    wide = load(tmp_path / "aligned", "float32", "cpu")
    assert Freeze(wide, chosen_neurons(model)).digest() == result.frozen_sha256


def test_no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny.model()
    with pytest.raises(InputError, match=r"needs the package peft.*safeneuron\[lora\]"):
        lora(model)
    network = network_with_noise()
    optimizer = adamw(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=1)


# -- two processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return outcomes("adapters_worker", tmp_path_factory.mktemp("adapters"))


@pytest.mark.slow
@pytest.mark.parametrize("case", adapters_worker.CASES)
def test_two_processes(case, processes):
    assert_passed(case, processes)


# -- runs ---------------------------------------------------------------------------------------------------------


SMALL_RUN = (
    'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.random=false", "attack.curve=[]",
    "align.lora_rank=4", "align.learning_rate=1e-2",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_of_two_rounds_with_adapters(tmp_path):
    config = write_world(tmp_path)
    execute(config, tmp_path / "run", changes=[*SMALL_RUN, 'variants.plain={lora_rank=0, freeze="none", rounds=1}'])
    record = read_json(tmp_path / "run" / "T2" / "align" / "frozen.json")
    assert record["frozen_identical"]
    assert record["free_change"] > 0
    found = NeuronSet.load(tmp_path / "run" / "T0" / "select" / "neurons.json")
    folders = [tmp_path / "model", *(tmp_path / "run" / state / "align" / "model" for state in ("T1", "T2"))]
    digests = [Freeze(load(folder, "float32", "cpu"), found).digest() for folder in folders]
    assert len(set(digests)) == 1, "what T0's round froze stays frozen"
    labels = [state["label"] for state in read_json(tmp_path / "run" / "report" / "results.json")["states"]]
    assert labels == [
        "base model", "freeze, LoRA of rank 4, round 1", "freeze, LoRA of rank 4, round 2",
        "plain DPO, LoRA of rank 4", "plain DPO",
    ]  # fmt: skip
