"""The proof of an anatomy: what it leaves, what it refuses, what it finds out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import INTERLEAVED
from safeneuron.neurons.layout import feed_forwards
from safeneuron.neurons.verification import prove, settle_layout
from tests.helpers import tiny, tiny_experts


def test_the_probe_leaves_every_bit_and_no_hook():
    network = tiny_experts.network("qwen2-moe").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prove(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert not any(
        vars(module).get("forward") or module._forward_hooks or module._forward_pre_hooks
        for module in network.modules()
    )


class Lies(nn.Module):
    """An FFN that looks like any other, and is not."""

    def __init__(self, mlp: nn.Module, lie: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.lie = lie

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        values = torch.sigmoid(self.gate_proj(hidden)) * self.up_proj(hidden)
        if self.lie == "mixes neurons":
            values = values - values.mean(dim=-1, keepdim=True)
        if self.lie == "mixes tokens":
            values = values.cumsum(dim=1)
        if self.lie == "says more":
            values = values + hidden.mean(dim=-1, keepdim=True)
        if self.lie == "rolls":
            values = values.roll(1, dims=-1)
        out = self.down_proj(values)
        if self.lie == "runs twice":
            out = out + self.down_proj(values)
        return out


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ("mixes neurons", r"that neuron and 4\d others"),
        ("mixes tokens", "that token alone"),
        ("says more", "rows at zero"),
        ("rolls", "not that neuron and 1 others"),
        ("runs twice", "2 times"),
    ],
)
def test_what_only_looks_like_an_ffn_is_refused(lie, found):
    network = tiny.network()
    for layer in network.model.layers:
        layer.mlp = Lies(layer.mlp, lie)
    assert len(feed_forwards(network)) == 3
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=found):
        settle_layout(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert INTERLEAVED not in vars(network.config)


class Alternating(nn.Module):
    """A fused FFN whose rows alternate between gate and up."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(hidden, 2 * width, bias=False)
        self.out = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        both = self.both(hidden)
        return self.out(torch.sigmoid(both[..., ::2]) * both[..., 1::2])


def test_rows_that_alternate_are_found_out_and_remembered(tmp_path):
    network = tiny.network()
    for layer in network.model.layers:
        layer.mlp = Alternating(tiny.HIDDEN, tiny.WIDTH)
    with pytest.raises(InputError, match="row of neuron"):
        prove(network)
    settle_layout(network)
    assert vars(network.config)[INTERLEAVED]
    rows = feed_forwards(network)[0].inputs
    assert [(first, step) for _, first, step in rows] == [(0, 2), (1, 2)]
    network.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(type(network.config).from_pretrained(tmp_path))
    assert vars(again.config)[INTERLEAVED]
