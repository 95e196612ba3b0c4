"""What is asked of every architecture: its neurons recorded, pruned and frozen, on a tiny model of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from safeneuron.errors import InputError
from safeneuron.models.doctor import Diagnosis, diagnosis
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.interventions import pruned, recorded
from safeneuron.neurons.layout import fingerprint, layers, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.verification import settle_layout
from safeneuron.training.freezing import frozen
from tests.helpers import shrunken

IDS = torch.tensor([[40, 41, 42, 43, 44, 45, 46], [29, 28, 27, 26, 25, 24, 23]])
# The families of which most chat models are.
MOST_USED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gptj",
    "opt", "bloom", "falcon", "mpt", "stablelm", "starcoder2", "olmo2", "granite", "cohere", "smollm3", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "jamba", "nemotron_h", "qwen3_next",
)  # fmt: skip


class Result(NamedTuple):
    """What came of one class: ``works``, ``refused`` or ``cannot be built``, and why, or what its neurons are."""

    name: str
    architecture: str
    outcome: str
    told: str


def check(name: str, model_class: Any) -> Result:
    """Build a tiny model of the class, and ask all of it. Errors of the program come through."""
    try:
        network = shrunken.network(model_class)
    except Exception as error:  # whatever the library finds wrong with sizes that were never meant to be
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Result(name, model_class.__name__, "cannot be built", reason[:160])
    try:
        widths_of(network)
        proof = settle_layout(network)
    except InputError as error:
        return Result(name, model_class.__name__, "refused", str(error))
    ask_all(network)
    return Result(name, model_class.__name__, "works", summary(diagnosis(name, network, proof, "")))


def summary(found: Diagnosis) -> str:
    """The anatomy in a line."""
    return "; ".join(
        f"layers {row.layers}: {row.ffn} ({row.form})" if row.form else f"layers {row.layers}: none"
        for row in found.rows
    )


def ask_all(network: nn.Module) -> None:
    """Record, prune and freeze some neurons of every layer, and compare."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    widths = widths_of(network)
    some = {layer: range(layer % 3, width, 5) for layer, width in enumerate(widths) if width}
    neurons = NeuronSet.of(some, widths, fingerprint(network))
    with torch.no_grad(), pruned(network, neurons), recorded(network) as recording:
        run(network)
    for layer in layers(network):
        if layer.index in recording.layers:
            values = recording.layers[layer.index]
            assert values.shape == (*IDS.shape, layer.width), (
                f"layer {layer.index} is recorded as {tuple(values.shape)}"
            )
            assert not values[..., neurons.layer(layer.index)].nan_to_num().any(), f"layer {layer.index} is not pruned"
            assert values.nan_to_num().any(), f"layer {layer.index} says nothing"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "weights have changed"
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    with frozen(network, neurons, optimizer) as freeze:
        for _ in range(2):
            optimizer.zero_grad()
            run(network).float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        assert freeze.changed() == []
        for piece in freeze.slices:
            moved = piece.parameter.detach() != before[piece.name]
            if piece.parameter.grad is not None:
                assert moved.any(), f"nothing of {piece.name} has moved"


def run(network: nn.Module) -> torch.Tensor:
    """The decoder's last hidden states."""
    decoder: Any = decoder_of(network)
    out = decoder(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    first: torch.Tensor = out[0]
    return first
