"""Weights that other libraries have packed, stood in for by a layer of the same make: what works, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from safeneuron import models
from safeneuron.adapters import merge_adapters
from safeneuron.aligning import align
from safeneuron.conformance import prove
from safeneuron.data import Pair, Prompt
from safeneuron.doctor import diagnosis
from safeneuron.edits import Edit
from safeneuron.errors import InputError
from safeneuron.ffn import fingerprint, owned_slices, pruned, recorded, widths_of
from safeneuron.freezing import Freeze
from safeneuron.measuring import measure
from safeneuron.models import Model, load
from safeneuron.neurons import NeuronSet
from safeneuron.persisting import engraved
from safeneuron.saliency import wanda
from safeneuron.selecting import select
from safeneuron.streaming import exchanges_of
from safeneuron.training import Training
from tests import tiny

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
    with pytest.raises(InputError, match=r"the FFN weights are quantised \(PackedLinear in layer 0\)"):
        Freeze(packed, some(packed))
    with (
        pytest.raises(InputError, match=r"packed \(PackedLinear\), so single ones"),
        engraved(packed, Edit.zero(some(packed))),
    ):
        pass
    for rank in (0, 4):
        with pytest.raises(InputError, match=r"packed \(PackedLinear\).*FreezeNeurons in a trainer of your own"):
            align(packed, pairs, None, Training(lora_rank=rank))
    with pytest.raises(InputError, match="SNIP and Wanda read FFNs of torch's linear layers"):
        wanda(packed, exchanges_of(packed, [Prompt("a")] * 2, ["b", "c"]))


def test_adapters_beside_packed_attention_are_kept_apart(packed):
    for layer in packed.network.model.layers:
        layer.self_attn.q_proj = nn.Linear(tiny.HIDDEN, 32, bias=False)
    adapted = get_peft_model(packed.network, LoraConfig(r=2, target_modules=["q_proj"]))
    assert Freeze(adapted, some(packed)).slices == []
    with pytest.raises(InputError, match=r"packed \(PackedLinear\).*keep them beside the model"):
        merge_adapters(adapted)


def test_a_gguf_file_is_loaded_through_transformers(tmp_path, monkeypatch):
    """Which dequantises it; the network then is a plain one and says so."""
    tiny.model().save(tmp_path)
    asked = []
    for kind in (models.AutoConfig, models.AutoTokenizer, models.AutoModelForCausalLM):
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
