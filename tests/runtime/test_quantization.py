"""Weights in 4 bits: the plain network is what they compute as, neurons keep their names, QLoRA is exact on it."""

from __future__ import annotations

import copy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import fingerprint
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runs.show import explain
from safeneuron.runtime.files import read_json
from safeneuron.runtime.quantization import dequantised, has_four_bits, is_quantised
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from safeneuron.training.lora import merge_adapters
from tests.helpers import tiny
from tests.helpers.frozen_checks import assert_frozen_stayed, snapshot, some_neurons
from tests.helpers.tiny_run import execute, write_world
from tests.training.test_alignment import (
    LN2,
    assert_same_result,
    assert_same_tensors,
    chosen_neurons,
    dpo_loss,
    interrupt_at,
    many_neurons,
    run,
)
from tests.training.test_lora import SMALL_RUN, adamw, dpo_trainer, lora, owned_adapter_entries, train

four_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(params=["llama", "phi3"])
def stored(request, tmp_path, monkeypatch) -> Path:
    """The folder of a tiny model of sizes that can be quantised, stored in bfloat16."""
    monkeypatch.setattr(tiny, "HIDDEN", 64)
    monkeypatch.setattr(tiny, "WIDTH", 64)
    model = tiny.model(request.param, head_dim=16)
    model.network.to(torch.bfloat16)
    model.save(tmp_path / "stored")
    return tmp_path / "stored"


def plain_of(model: Model) -> Model:
    return Model(dequantised(model.network), model.tokenizer, "plain", "plain", model.stored_dtype)


# -- the weights --------------------------------------------------------------------------------------------------


@four_bits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plain_network_is_what_the_quantised_one_computes(stored, dtype):
    given, model = load(stored, dtype, "cpu"), load(stored, dtype, "cpu", quantise="4bit")
    plain = plain_of(model)
    assert has_four_bits(model.network)
    assert not has_four_bits(plain.network)
    assert model.fingerprint == given.fingerprint == plain.fingerprint
    assert model.widths == given.widths
    assert plain.network.dtype == given.network.dtype
    before, after = snapshot(given.network), snapshot(plain.network)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        linear = "_proj" in name
        assert torch.equal(weight, before[name]) != linear, name
        assert (weight - before[name]).abs().mean() < 0.15 * before[name].abs().mean(), name
    ids = torch.arange(4, 20)[None]
    for mode in (True, False):
        with torch.no_grad(), recorded(model) as ours, recorded(plain) as expected:
            scores = model.network.train(mode)(ids).logits, plain.network.train(mode)(ids).logits
        torch.testing.assert_close(*scores)
        torch.testing.assert_close(ours.layers, expected.layers)
    # An answer has not repacked and rounded the weights, as the library does on some processors.
    assert_same_tensors(after, snapshot(dequantised(model.network)))


@four_bits
def test_pruning_a_quantised_model(stored):
    model = load(stored, "float32", "cpu", quantise="4bit")
    plain, neurons, ids = plain_of(model), many_neurons(model), torch.arange(4, 20)[None]
    with torch.no_grad(), pruned(model, neurons), pruned(plain, neurons):
        torch.testing.assert_close(model.network(ids).logits, plain.network(ids).logits)


@four_bits
def test_a_quantised_model_is_not_saved(stored, tmp_path):
    model = load(stored, device="cpu", quantise="4bit")
    with pytest.raises(InputError, match="4 bits"):
        model.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@four_bits
def test_a_quantised_model_without_a_history_is_known_by_its_own_weights(stored):
    model = load(stored, "float32", "cpu", quantise="4bit")
    vars(model.network.config).pop("safeneuron_lineage")
    assert fingerprint(model) == fingerprint(plain_of(model))


def test_a_plain_network_is_returned_as_it_is():
    network = tiny.network()
    assert dequantised(network) is network


@four_bits
def test_rows_that_the_library_unpacks_wrongly_on_a_processor_are_refused(tmp_path):
    tiny.model().save(tmp_path)
    with pytest.raises(InputError, match="multiple of 64"):
        load(tmp_path, device="cpu", quantise="4bit")


def test_quantising_without_the_library(tmp_path, monkeypatch):
    tiny.model().save(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="bitsandbytes"):
        load(tmp_path, device="cpu", quantise="4bit")
    with pytest.raises(InputError, match="8bit"):
        load(tmp_path, device="cpu", quantise="8bit")


# -- freezing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_frozen_in_their_adapters_alone(dtype):
    network = tiny.network()
    neurons = some_neurons(network)
    weight = network.model.layers[2].mlp.up_proj.weight
    small = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    network.model.layers[2].mlp.up_proj.weight = small
    assert is_quantised(small)
    assert not is_quantised(weight)
    with pytest.raises(InputError, match=r"int8|float8"):
        Freeze(network, neurons)
    assert all("layers.2.mlp.up_proj" not in piece.name for piece in owned_slices(network, neurons))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["up_proj"]))
    slices = [piece.name for piece in Freeze(model, neurons).slices if "layers.2.mlp.up_proj" in piece.name]
    assert slices == ["model.layers.2.mlp.up_proj.lora_B.default.weight"]


@four_bits
@pytest.mark.parametrize("mode", ["plain", "bfloat16 autocast", "gradient checkpointing"])
def test_qlora_keeps_the_frozen_neurons_of_the_plain_model(stored, mode):
    model = load(stored, "float32", "cpu", quantise="4bit")
    before, neurons = snapshot(dequantised(model.network)), chosen_neurons(model)
    adapted = get_peft_model(model.network, LoraConfig(r=4, target_modules="all-linear")).train()
    if mode == "gradient checkpointing":
        model.network.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    start = snapshot(adapted)
    optimizer = adamw(adapted)
    with frozen(adapted, neurons, optimizer):
        train(adapted, optimizer, mode=mode)
    for name, mask in owned_adapter_entries(adapted).items():
        parameter = adapted.get_parameter(name)
        assert (parameter[mask] == 0).all()
        assert (parameter != start[name])[~mask].all(), f"{name}: a free entry did not move"
    merged = merge_adapters(adapted)
    after = snapshot(merged)
    assert before.keys() == after.keys()
    assert_frozen_stayed(before, after)
    assert fingerprint(merged) == neurons.fingerprint
    assert all(torch.equal(weight, before[name]) != ("_proj" in name) for name, weight in after.items())


@four_bits
def test_qlora_in_trls_trainer(stored, tmp_path):
    model = load(stored, "bfloat16", "cpu", quantise="4bit")
    before, callback = snapshot(dequantised(model.network)), FreezeNeurons(chosen_neurons(model))
    trainer = dpo_trainer(
        model.network, tmp_path / "out", callback, peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    trainer.train()
    callback.freeze.verify()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LN2, abs=5e-3)
    after = snapshot(merge_adapters(trainer.model))
    assert_frozen_stayed(before, after)
    assert not all(torch.equal(weight, before[name]) for name, weight in after.items())


@four_bits
def test_qlora_on_a_model_that_transformers_has_quantised(stored):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    network = AutoModelForCausalLM.from_pretrained(stored, quantization_config=settings, device_map="cpu")
    vars(network.config).pop("safeneuron_lineage")
    before, neurons = snapshot(dequantised(network)), some_neurons(network)
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = adamw(adapted)
    with frozen(adapted, neurons, optimizer):
        train(adapted, optimizer)
    merged = merge_adapters(adapted)
    assert_frozen_stayed(before, snapshot(merged))
    assert fingerprint(merged) == neurons.fingerprint
    assert "quantization_config" not in merged.config.to_dict()
    merged.to(torch.float32)  # A plain model, which transformers no longer takes for a quantised one.


@four_bits
def test_weights_that_the_library_has_repacked_cannot_be_unpacked_exactly(stored):
    model = load(stored, "float32", "cpu", quantise="4bit")
    weight = model.network.model.layers[0].mlp.down_proj.weight
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="repacked"):
        dequantised(model.network)


# -- alignment ----------------------------------------------------------------------------------------------------


@four_bits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alignment_in_four_bits(stored, dtype, tmp_path):
    model = load(stored, dtype, "cpu", quantise="4bit")
    plain = plain_of(model)
    before = snapshot(plain.network)
    result = lora(model, chosen_neurons(model), epochs=2, gradient_checkpointing=True)
    assert_same_tensors(before, snapshot(dequantised(model.network)))
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=5e-3 if dtype == "bfloat16" else 1e-6)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert result.frozen_identical
    after = snapshot(result.model.network)
    assert_frozen_stayed(before, after)
    # What was stored in bfloat16 and quantised from float32 is no longer of bfloat16.
    assert result.model.network.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    change = sum(float((after[name].double() - weight.double()).square().sum()) for name, weight in before.items())
    assert result.free_change == pytest.approx(
        (change / sum(float(weight.double().square().sum()) for weight in before.values())) ** 0.5, rel=0.05
    )
    result.model.save(tmp_path / "aligned")
    again = load(tmp_path / "aligned", "float32", "cpu")
    assert again.fingerprint == model.fingerprint
    assert Freeze(again, chosen_neurons(model)).digest() == result.frozen_sha256


@four_bits
def test_the_merged_model_is_the_one_that_was_trained_in_four_bits(stored):
    model = load(stored, "float32", "cpu", quantise="4bit")
    one, two = (lora(model, chosen_neurons(model), epochs=n, batch_size=8, micro_batch_size=4) for n in (1, 2))
    assert two.log[1]["loss"] == pytest.approx(dpo_loss(one.model, plain_of(model)), rel=1e-4)
    assert two.log[1]["loss"] < 0.69


@four_bits
def test_interrupted_alignment_in_four_bits_goes_on(stored, tmp_path):
    model = load(stored, "float32", "cpu", quantise="4bit")
    settings = {"epochs": 2, "batch_size": 2, "micro_batch_size": 1, "save_every": 2}
    straight = lora(model, chosen_neurons(model), **settings)
    with pytest.raises(KeyboardInterrupt):
        lora(model, chosen_neurons(model), checkpoints=tmp_path / "c", progress=interrupt_at(5), **settings)
    again = lora(model, chosen_neurons(model), checkpoints=tmp_path / "c", **settings)
    assert_same_result(again, straight)


@four_bits
def test_a_run_in_four_bits(stored, tmp_path):
    config = write_world(tmp_path)
    shutil.rmtree(tmp_path / "model")
    stored.rename(tmp_path / "model")
    execute(config, tmp_path / "run", changes=[*SMALL_RUN, "align.quantise=4bit", "align.rounds=1", "variants={}"])
    frozen, model = tmp_path / "run" / "T1" / "align" / "frozen.json", tmp_path / "run" / "T1" / "align" / "model"
    record = read_json(frozen)
    assert record["frozen_identical"]
    assert record["free_change"] > 0
    assert "bit-identical to the start in 4bit." in "\n".join(explain(frozen))
    neurons = NeuronSet.load(tmp_path / "run" / "T0" / "select" / "neurons.json")
    given = plain_of(load(tmp_path / "model", "float32", "cpu", quantise="4bit"))
    digests = [Freeze(one, neurons).digest() for one in (load(model, "float32", "cpu"), given)]
    assert digests == [record["frozen_sha256"]] * 2
    (_, aligned) = read_json(tmp_path / "run" / "report" / "results.json")["states"]
    assert aligned["label"] == "freeze, QLoRA of rank 4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["align.quantise=4bit"], "lora_rank"),
        (["align.quantise=4bit", "align.lora_rank=8", "align.rounds=2"], "anew"),
        (["align.quantise=8bit"], "'none' or '4bit'"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(InputError, match=message):
        read_config("demo", changes)


@four_bits
def test_quantised_weights_are_not_trained_themselves(stored):
    model = load(stored, device="cpu", quantise="4bit")
    with pytest.raises(InputError, match="lora_rank"):
        run(model, chosen_neurons(model))
    with pytest.raises(InputError, match="quantised"):
        Freeze(copy.deepcopy(model.network), chosen_neurons(model))
