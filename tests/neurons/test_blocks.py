"""What every block of neurons says of itself, in each layout of weights, and in one that only this test knows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from safeneuron.neurons.blocks import Block, Layer, Location, OutputProjection, Span
from safeneuron.neurons.layout import layers, names_in
from safeneuron.neurons.verification import prove
from tests.helpers import tiny, tiny_experts
from tests.helpers.tiny_experts import EXPERTS, WIDTH

LAYOUTS = {
    "dense": lambda: tiny.network("llama", mlp_bias=True),
    "fused": lambda: tiny.network("phi3"),
    "stacked": lambda: tiny_experts.network("gpt-oss"),
    "list": lambda: tiny_experts.split(tiny_experts.network()),
}


@pytest.fixture(params=LAYOUTS)
def network(request):
    return LAYOUTS[request.param]()


def own_entries(network: nn.Module, block: Block, neuron: int) -> list[Tensor]:
    """What a neuron owns, by its slices."""
    values = []
    for piece in block.slices(names_in(network), torch.tensor([block.first + neuron])):
        for number, place in enumerate(piece.index.tolist()):
            whole = piece.parameter if piece.experts is None else piece.parameter[int(piece.experts[number])]
            values.append(whole.select(piece.dim - (piece.experts is not None), place))
    return values


def test_rows_biases_and_column_are_what_the_slices_hold(network):
    for layer in layers(network):
        for block in layer.blocks:
            neuron = block.neurons - 3
            views = [*block.rows(neuron), *block.biases(neuron), block.column(neuron)]
            entries = own_entries(network, block, neuron)
            assert sorted(view.data_ptr() for view in views) == sorted(entry.data_ptr() for entry in entries)
            assert {view.shape[0] for view in (*block.rows(neuron), block.column(neuron))} == {tiny.HIDDEN}


def test_spans_and_output_projections_lie_end_to_end(network):
    for layer in layers(network):
        for parts in (
            [span for block in layer.blocks for span in block.spans()],
            [projection for block in layer.blocks for projection in block.output_projections()],
        ):
            firsts = [part.first for part in parts]
            assert firsts == [sum(part.width for part in parts[:number]) for number in range(len(parts))]
            assert sum(part.width for part in parts) == layer.width


def test_channels_of_other_blocks_are_nobodys(network):
    for layer in layers(network):
        counts = [len(block.own(torch.arange(layer.width))) for block in layer.blocks]
        assert counts == [block.neurons for block in layer.blocks]
        for block in layer.blocks:
            assert block.slices(names_in(network), torch.tensor([], dtype=torch.int64)) == []


def test_a_layer_is_plain_that_has_one_ffn_for_all_tokens():
    assert [layer.is_plain for layer in layers(tiny.network())] == [True] * tiny.LAYERS
    assert not any(layer.is_plain for layer in layers(tiny_experts.network()))
    assert not Layer(0, nn.Identity(), ()).is_plain
    dense, sparse = layers(tiny_experts.network("deepseek-v3"))
    assert (dense.is_plain, sparse.is_plain) == (True, False)
    assert [block.is_routed for block in sparse.blocks] == [True, False]


def test_routers_are_looked_for_where_the_experts_are():
    (stack, shared) = layers(tiny_experts.network("qwen2-moe"))[0].blocks
    assert (stack.router_path, shared.router_path) == (("mlp",), None)
    listed = layers(tiny_experts.split(tiny_experts.network()))[0].blocks
    assert {block.router_path for block in listed} == {("mlp",)}
    assert [block.expert for block in listed] == list(range(EXPERTS))


@pytest.mark.parametrize("away", [lambda weight: weight.to("meta"), lambda weight: weight.to(torch.float8_e4m3fn)])
def test_weights_that_are_away_or_quantised_cannot_be_read(network, away):
    block = layers(network)[1].blocks[0]
    assert block.is_readable
    location = block.output_location()
    owner = next(module for module in block.holder.modules() if location.name in module._parameters)
    owner._parameters[location.name] = nn.Parameter(away(location.parameter.data), requires_grad=False)
    assert not block.is_readable


@dataclass(frozen=True)
class OneMatrix(Block):
    """A layout of nobody's: rows and columns of all neurons in one parameter ``[2 * neuron, hidden]``, in turns."""

    module: nn.Linear

    is_mixture, has_open_order, form, kind = False, False, "one matrix", "one matrix"
    router_path, packed = None, ""

    @property
    def holder(self) -> nn.Module:
        return self.module

    @property
    def hooked(self) -> nn.Module | None:
        return self.module

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    def spans(self) -> Iterator[Span]:
        yield Span(self.name, self.first, self.width)

    def input_locations(self) -> list[Location]:
        return [Location("weight", self.module.weight, 0, 0, 2)]

    def output_location(self) -> Location | None:
        return Location("weight", self.module.weight, 0, 1, 2)

    def parameters(self) -> Iterator[tuple[nn.Parameter, tuple[int, ...] | None]]:
        yield self.module.weight, None

    def output_projections(self) -> Iterator[OutputProjection]:
        yield OutputProjection(self.first, self.width, self.module.weight, None, True)

    def samples(self, name: str, precision: torch.dtype) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        yield (tiny.HIDDEN, self.width), self.module.weight[1::2].T

    def divided(self, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        return neurons, None


def test_another_layout_says_where_its_weights_lie_and_gets_all_else():
    block: Block = OneMatrix(0, 5, nn.Linear(tiny.HIDDEN, 10, bias=False), first=7, name="ffn")
    weight = block.holder.weight
    assert isinstance(block.kind, Hashable)
    assert (block.neurons, block.is_routed, block.is_readable) == (5, False, True)
    assert torch.equal(block.rows(2)[0], weight[4])
    assert torch.equal(block.column(2), weight[5])
    assert block.biases(2) == []
    (piece,) = block.slices({id(weight): "ffn.weight"}, torch.tensor([1, 8, 11]))
    assert (piece.name, piece.dim, piece.index.tolist()) == ("ffn.weight", 0, [2, 8, 3, 9])
    assert Layer(0, nn.Identity(), (block,)).is_plain


def test_experts_are_numbered_and_shared_ones_named():
    layer = layers(tiny_experts.network("qwen2-moe"))[1]
    spans = [span for block in layer.blocks for span in block.spans()]
    assert [span.ffn for span in spans] == [*range(EXPERTS), "mlp.shared_expert"]
    assert [span.first for span in spans] == [expert * WIDTH for expert in range(EXPERTS + 1)]


def test_the_proof_reads_columns_of_the_block(monkeypatch):
    """If it did not, a wrong column would not be seen."""
    right = Block.column
    monkeypatch.setattr(Block, "column", lambda block, neuron: right(block, (neuron + 1) % block.neurons))
    with pytest.raises(Exception, match="column"):
        prove(tiny.network())
