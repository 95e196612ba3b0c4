"""Checkpoints of compressed-tensors, as its library writes them: plain when loaded, and all that follows."""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.doctor import examine
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.runtime.quantization import compressed_by, decompress
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import select
from safeneuron.training.freezing import frozen
from tests.helpers import tiny, tiny_experts
from tests.helpers.frozen_checks import assert_frozen_stayed, snapshot, some_neurons

real = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed (tried with 0.20.0)"
)
IDS = torch.arange(4, 20)[None]
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
EACH_TOKEN = {"strategy": "token", "dynamic": True}
# The format, how weights and activations are rounded, and whether the weights are stored so.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, bool]] = {
    "W4A16": ("pack-quantized", INT4, None, True),
    "W4A16, asymmetric": ("pack-quantized", {**INT4, "symmetric": False}, None, True),
    "W8A16": ("naive-quantized", INT8, None, True),
    "W8A8": ("int-quantized", INT8, {**INT8, **EACH_TOKEN}, True),
    "FP8": ("float-quantized", FLOAT8, {**FLOAT8, **EACH_TOKEN}, True),
    "FP8, static": ("float-quantized", FLOAT8, FLOAT8, True),
    "stored whole": ("dense", INT4, None, False),
}


def bounds(weight: torch.Tensor, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest of the weights that share a scale."""
    if settings["strategy"] == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if settings["strategy"] == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    groups = weight.view(len(weight), -1, settings["group_size"])
    return groups.amin(-1), groups.amax(-1)


def store(model: Model, folder: Path, form: str) -> None:
    """Write the model as the library does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    kind, weights, inputs, small = FORMS[form]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    config = QuantizationConfig(config_groups={"all": scheme}, quantization_status="frozen", ignore=["lm_head"])
    apply_quantization_config(model.network, config, show_progress=False)
    for module in model.network.modules():
        if "quantization_scheme" in vars(module):
            scale, zero = calculate_qparams(*bounds(module.weight.data, weights), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            if "input_scale" in module._parameters:
                module.input_scale.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model.network, kind if small else None)
    if small:
        compressor.compress_model(model.network)
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.fixture(scope="module", params=FORMS)
def stored(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("stored")
    store(tiny.model(), folder, request.param)
    return request.param, folder


def logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(IDS).logits


@real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_network_is_what_the_library_unpacks(stored, dtype):
    form, folder = stored
    model = load(folder, str(dtype).removeprefix("torch."), "cpu")
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs, ours = logits(library), logits(model.network)
    rounds = FORMS[form][2] is not None
    assert torch.equal(theirs, ours) != rounds
    assert ("activations rounded" in model.unpacked) == rounds
    for name, weight in snapshot(model.network).items():
        assert weight.dtype == dtype
        if FORMS[form][3]:
            assert torch.equal(weight, library.get_parameter(name))
    plain = tiny.network()
    assert [name for name, _ in model.network.named_modules()] == [name for name, _ in plain.named_modules()]
    assert model.network.state_dict().keys() == plain.state_dict().keys()
    assert 0.01 < float((ours - logits(plain)).abs().max()) < 3


@real
def test_all_that_can_be_done_with_a_plain_model(stored, tmp_path):
    _, folder = stored
    model = load(folder, "float32", "cpu")
    prompts = [Prompt(f"{word} {number}") for word in ("how", "why") for number in range(4)]
    assert len(select(measure(model, prompts[:4], prompts[4:]), density=0.05))
    neurons = some_neurons(model.network)
    with torch.no_grad(), pruned(model, neurons), recorded(model) as recording:
        model.network(IDS)
    assert not recording.layers[0][..., [0, 7]].any()
    before, optimizer = snapshot(model.network), torch.optim.AdamW(model.network.parameters(), lr=1e-2)
    with frozen(model, neurons, optimizer):
        model.network.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = snapshot(model.network)
    assert_frozen_stayed(before, after)
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())
    model.save(tmp_path / "again")
    again = load(tmp_path / "again", "float32", "cpu")
    assert again.unpacked == ""
    assert again.fingerprint == model.fingerprint
    assert all(torch.equal(weight, after[name]) for name, weight in snapshot(again.network).items())


@real
def test_doctor_says_how_it_was_stored(tmp_path):
    store(tiny.model(), tmp_path, "W8A8")
    found = examine(str(tmp_path))
    assert found.remarks[-1] == (
        "Stored int-quantized by compressed-tensors, with its activations rounded, which they are not here; loaded "
        "dequantised."
    )
    assert any("Can be frozen bit for bit" in remark for remark in found.remarks)
    assert found.neurons == 3 * tiny.WIDTH


@real
def test_a_rounded_cache_is_left_out(tmp_path):
    store(tiny.model(), tmp_path, "W4A16")
    before = logits(load(tmp_path, "float32", "cpu").network)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = FLOAT8
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, "float32", "cpu")
    assert torch.equal(logits(model.network), before)
    assert model.network.state_dict().keys() == tiny.network().state_dict().keys()


@real
@pytest.mark.parametrize(
    ("settings", "unpacked"),
    [({**INT4, "group_size": 8}, True), (FLOAT8, True), ({**INT4, "group_size": 8, "symmetric": False}, False)],
    ids=["W4A16", "FP8", "asymmetric"],
)
def test_experts(settings, unpacked, tmp_path):
    """They are stored one by one, and transformers stacks what it unpacks; of what it cannot, it says so."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    given = tiny_experts.model()
    given.save(tmp_path)
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    kind = infer_module_format(nn.Linear, scheme).value
    packer, tensors = BaseCompressor.get_value_from_registry(kind), {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        whole = {"weight": weight}
        if name.endswith("_proj.weight"):
            scale, zero = calculate_qparams(*bounds(weight, settings), scheme.weights)
            whole = packer.compress({**whole, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in whole.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "config_groups": {"all": json.loads(scheme.model_dump_json())}, "format": kind, "ignore": ["lm_head"],
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip
    config["quantization_config"]["ignore"].append("re:.*mlp.gate$")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not unpacked:
        with pytest.raises(InputError, match="transformers cannot unpack its weights, such as experts"):
            load(tmp_path, "float32", "cpu")
        return
    model = load(tmp_path, "float32", "cpu")
    assert model.widths == given.widths
    for name, weight in snapshot(given.network).items():
        found = model.network.get_parameter(name)
        assert found.dtype == torch.float32
        assert (found - weight).abs().max() < 0.1 * weight.abs().max()


# -- without the library ------------------------------------------------------------------------------------------


def config_with(**settings: Any) -> LlamaConfig:
    return LlamaConfig(quantization_config={"quant_method": "compressed-tensors", **settings})


def test_what_a_config_says():
    groups = {"all": {"targets": ["Linear"]}}
    config = config_with(config_groups=groups, format="pack-quantized", kv_cache_scheme={"num_bits": 8})
    assert compressed_by(config) == "pack-quantized"
    assert config.quantization_config["kv_cache_scheme"] is None
    assert compressed_by(LlamaConfig()) == ""
    assert compressed_by(LlamaConfig(quantization_config={"quant_method": "gptq"})) == ""
    cache_alone = config_with(kv_cache_scheme={"num_bits": 8})
    assert compressed_by(cache_alone) == ""
    assert "quantization_config" not in vars(cache_alone)
    with pytest.raises(InputError, match=r"with transforms of its weights \(transform_config\)"):
        compressed_by(config_with(config_groups=groups, transform_config={"config_groups": {"u": {}}}))


def test_without_the_library_loading_says_which_is_needed(tmp_path, monkeypatch):
    tiny.model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"all": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        "transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False
    )  # fmt: skip
    with pytest.raises(InputError, match=r"pip install compressed-tensors"):
        load(tmp_path, "float32", "cpu")


class Status(IntEnum):
    FROZEN = 1
    COMPRESSED = 2


def test_every_layer_is_unpacked_once_and_the_hook_taken_off(monkeypatch):
    """With a stand-in for the library, which halves what it packs."""
    done: list[str] = []

    def compress_module(module: nn.Linear) -> None:
        done.append("packed")
        pack(module)

    def decompress_module(module: nn.Linear, leave_decompressed: bool) -> None:
        assert not leave_decompressed
        done.append("unpacked")
        module.weight = nn.Parameter(module.weight_packed.data.float() * 2, requires_grad=False)
        del module.weight_packed, module.quantization_scheme, module.quantization_status

    def pack(module: nn.Linear) -> None:
        module.weight_packed = nn.Parameter((module.weight.data / 2).to(torch.float16), requires_grad=False)
        del module.weight

    library = {"compressors": ModuleType("compressors"), "quantization": ModuleType("quantization")}
    vars(library["compressors"]).update(compress_module=compress_module, decompress_module=decompress_module)
    vars(library["quantization"]).update(QuantizationStatus=Status)
    for name, module in library.items():
        monkeypatch.setitem(sys.modules, f"compressed_tensors.{name}", module)
    monkeypatch.setitem(sys.modules, "compressed_tensors", ModuleType("compressed_tensors"))
    network = tiny.network()
    before = snapshot(network)
    for number, layer in enumerate(network.model.layers):
        linear = layer.mlp.down_proj
        linear.quantization_scheme = SimpleNamespace(
            weights=object(), input_activations=None, output_activations=object() if number else None
        )
        linear.quantization_status = Status.COMPRESSED if number else Status.FROZEN
        linear.forward = lambda hidden: pytest.fail("still rounded")
        if number:
            pack(linear)
    asked: list[nn.Module] = []
    network.ct_decompress_hook = network.register_forward_pre_hook(lambda module, _: asked.append(module))
    network.is_quantized = True
    assert decompress(network, torch.float32)
    assert done == ["packed", "unpacked", "unpacked", "unpacked"]
    assert "is_quantized" not in vars(network)
    logits(network)
    assert not asked
    assert network.state_dict().keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(network.get_parameter(name), nn.Parameter(weight), rtol=2e-3, atol=1e-4)
