"""Weights that other libraries have packed: what works, what is refused.

By a layer of the same make, and by checkpoints of GPTQ and AWQ where the library that runs them is installed.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from safeneuron.attacks.checkpoint import with_edit_in_weights
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from safeneuron.models.doctor import diagnosis
from safeneuron.models.exchanges import exchanges_of
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import Edit, pruned, recorded
from safeneuron.neurons.layout import feed_forwards, fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.verification import prove
from safeneuron.neurons.weights import owned_slices
from safeneuron.selection.measurement import measure
from safeneuron.selection.saliency import wanda
from safeneuron.selection.scores import select
from safeneuron.training.alignment import align
from safeneuron.training.freezing import Freeze
from safeneuron.training.lora import merge_adapters
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny
from tests.helpers.frozen_checks import snapshot

IDS = torch.tensor([[40, 41, 42, 43, 44]])


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's layers are made: integers and scales in buffers, no parameter named weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.qweight.to(hidden) * self.scales).T


@pytest.fixture
def packed():
    """A tiny model whose decoder is packed, and which says what its plain twin says."""
    model = tiny.model()
    for layer in model.network.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, PackedLinear(module))
    return model


def some(model: Model) -> NeuronSet:
    return NeuronSet.of({0: [3, 17], 2: [0, 47]}, widths_of(model), fingerprint(model))


def test_packed_weights_are_measured_selected_and_pruned(packed):
    prompts = [Prompt(f"{word} {number}") for word in ("how", "why") for number in range(4)]
    assert packed.widths == (tiny.WIDTH,) * 3
    assert len(select(measure(packed, prompts[:4], prompts[4:]), density=0.05))
    with torch.no_grad(), pruned(packed, some(packed)), recorded(packed) as recording:
        packed.network(input_ids=IDS)
    assert not recording.layers[0][..., [3, 17]].any()
    assert recording.layers[0].any()
    assert owned_slices(packed, some(packed)) == []
    assert prove(packed).unproved == ("the weights of layer 0 mlp, which are quantised or spread",)
    remarks = diagnosis("packed", packed.network, prove(packed), "").remarks
    assert any(
        "packed (PackedLinear): a pruned checkpoint cannot be written, and align refuses it" in one for one in remarks
    )


def test_fingerprints_of_packed_models_differ(packed):
    known = packed.fingerprint
    packed.network.model.layers[1].mlp.down_proj.qweight.roll(1)
    assert packed.fingerprint == known
    packed.network.model.layers[1].mlp.down_proj.qweight += 1
    assert packed.fingerprint != known


def test_what_needs_the_weights_is_refused(packed):
    pairs = [Pair(({"role": "user", "content": "hm"},), "yes", "no")]
    with pytest.raises(InputError, match="PackedLinear"):
        Freeze(packed, some(packed))
    with (
        pytest.raises(InputError, match="single ones"),
        with_edit_in_weights(packed, Edit.zero(some(packed))),
    ):
        pass
    for rank in (0, 4):
        with pytest.raises(InputError, match="FreezeNeurons"):
            align(packed, pairs, None, TrainingSettings(lora_rank=rank))
    with pytest.raises(InputError, match="SNIP"):
        wanda(packed, exchanges_of(packed, [Prompt("a")] * 2, ["b", "c"]))


def test_adapters_beside_packed_attention_are_kept_apart(packed):
    for layer in packed.network.model.layers:
        layer.self_attn.q_proj = nn.Linear(tiny.HIDDEN, 32, bias=False)
    adapted = get_peft_model(packed.network, LoraConfig(r=2, target_modules=["q_proj"]))
    assert Freeze(adapted, some(packed)).slices == []
    with pytest.raises(InputError, match="beside the model"):
        merge_adapters(adapted)


# -- checkpoints of GPTQ and AWQ ----------------------------------------------------------------------------------

GROUP, EIGHT = 32, torch.arange(8, dtype=torch.int32) * 4
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gptq": {
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "backend": "torch",
    },
    "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", "backend": "torch_awq"},
}


def packed_weight(weight: Tensor, method: str) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as the method stores it, and what it then stands for: integers of 4 bits, 8 to the word."""
    outputs, inputs = weight.shape
    groups = weight.view(outputs, -1, GROUP)
    scales = groups.abs().amax(-1) / 7
    small = (groups / scales[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    whole = ((small - 8) * scales.half().float()[..., None]).view(outputs, inputs)
    columns, tensors = small.view(outputs, inputs).T, {"scales": scales.half().T.contiguous()}
    if method == "gptq":
        words = columns.reshape(inputs // 8, 8, outputs) << EIGHT[:, None]
        tensors["qweight"] = words.sum(1, dtype=torch.int32)
        tensors["g_idx"] = (torch.arange(inputs) // GROUP).to(torch.int32)
        zeros = torch.full((inputs // GROUP, outputs // 8, 8), 7, dtype=torch.int32)
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        words = columns.reshape(inputs, outputs // 8, 8)[..., order] << EIGHT
        tensors["qweight"] = words.sum(-1, dtype=torch.int32)
        zeros = torch.full((inputs // GROUP, outputs // 8, 8), 8, dtype=torch.int32)
    tensors["qzeros"] = (zeros << EIGHT).sum(-1, dtype=torch.int32)
    return tensors, whole


@pytest.mark.skipif(
    find_spec("gptqmodel") is None or find_spec("optimum") is None,
    reason="gptqmodel and optimum, which run GPTQ and AWQ, are not installed (tried with 7.7.0 and 2.3.0)",
)
@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_checkpoint_that_its_own_library_runs(method, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "HIDDEN", 64)
    monkeypatch.setattr(tiny, "WIDTH", 96)
    plain = tiny.model(head_dim=16)
    plain.save(tmp_path)
    tensors, weights = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        packs = name.endswith("_proj.weight")
        own, weights[name] = packed_weight(weight, method) if packs else ({"weight": weight.half()}, weight.half())
        tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in own.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float16"}
    del config["safeneuron_lineage"]
    config["quantization_config"] = {"quant_method": method, **CHECKPOINTS[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain.network.load_state_dict(weights, strict=False)
    prints = set()
    for dtype in ("bfloat16", "float16", "float32"):
        model = load(tmp_path, dtype, "cpu")
        with torch.no_grad():
            ours, theirs = model.network(IDS).logits.float(), plain.network(IDS).logits
        assert (ours - theirs).abs().max() < (0.3 if dtype == "bfloat16" else 0.05)
        prints.add(model.fingerprint)
    assert len(prints) == 1, "the neurons are the same in every precision"
    assert model.widths == (96,) * 3
    prompts = [Prompt(f"{word} {number}") for word in ("how", "why") for number in range(4)]
    neurons = select(measure(model, prompts[:4], prompts[4:]), density=0.05)
    before = snapshot(plain.network)
    with torch.no_grad(), pruned(model, neurons):
        ours = model.network(IDS).logits.float()
    for layer, channels in neurons.layers().items():
        plain.network.model.layers[layer].mlp.down_proj.weight.data[:, channels] = 0
    with torch.no_grad():
        assert (ours - plain.network(IDS).logits).abs().max() < 0.05
    assert any(not torch.equal(weight, before[name]) for name, weight in snapshot(plain.network).items())
    with pytest.raises(InputError, match="single ones"), with_edit_in_weights(model, Edit.zero(neurons)):
        pass
    with pytest.raises(InputError, match="quantised"):
        Freeze(model, neurons)
    assert prove(model).unproved == ("the weights of layer 0 mlp, which are quantised or spread",)


def test_matrices_that_are_all_square_are_told_apart(monkeypatch):
    """Each of the three might be the output projection."""
    monkeypatch.setattr(tiny, "WIDTH", tiny.HIDDEN)
    model = tiny.model()
    assert model.widths == (tiny.HIDDEN,) * 3
    assert [block.output for block in feed_forwards(model)] == [
        layer.mlp.down_proj for layer in model.network.model.layers
    ]
    assert prove(model).unproved == ()


def test_square_matrices_that_cannot_be_told_apart_are_refused(monkeypatch):
    """Packed, so that the probe cannot try them, named alike, and the output projection defined first."""
    monkeypatch.setattr(tiny, "WIDTH", tiny.HIDDEN)
    model = tiny.model()
    for layer in model.network.model.layers:
        layer.mlp = Misleading(*(getattr(layer.mlp, f"{name}_proj") for name in ("down", "gate", "up")))
    with pytest.raises(InputError, match="output projection"):
        prove(model)


class Misleading(nn.Module):
    """A gated FFN in whose order of definition the output projection comes first."""

    def __init__(self, down: nn.Linear, gate: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.one, self.other, self.third = (PackedLinear(linear) for linear in (down, gate, up))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.one(nn.functional.silu(self.other(hidden)) * self.third(hidden))


def test_a_gguf_file_is_loaded_through_transformers(tmp_path, monkeypatch):
    """Which dequantises it; the network then is a plain one and says so."""
    tiny.model().save(tmp_path)
    asked = []
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        original = kind.from_pretrained

        def instead(source: str, *, gguf_file: str = "", original: Any = original, **options: Any) -> Any:
            asked.extend([gguf_file] if gguf_file else [])
            found = original(source, **options)
            for network in found[:1] if isinstance(found, tuple) and isinstance(found[0], nn.Module) else ():
                network.config.quantization_config = {"quant_method": "gguf"}
                network.is_quantized = True
            return found

        monkeypatch.setattr(kind, "from_pretrained", instead)
    model = load(tmp_path / "tiny.gguf", dtype="float32")
    assert asked == ["tiny.gguf"] * 3
    assert model.fingerprint == tiny.model().fingerprint
    assert "quantization_config" not in vars(model.network.config)
    assert not vars(model.network).get("is_quantized")
