"""The proof that a model's FFNs are where ``anatomy`` says: a few tokens, a neuron or two of each kind of layer.

By experiment, on the model's own weights, which are put back bit by bit: a neuron pruned by hook gives what its column
at zero gives; a change of its rows changes it and no other; without its rows it is the same at every token; and its
activation at a token is computed from that token alone. A model that fails is refused, so that none is wrong unseen.

Shapes: the batch is ``[2, 6]`` tokens; activations are kept as ``[row * token, channel]`` by the first channel of their
FFN in the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.errors import InputError
from safeneuron.neurons.anatomy import INTERLEAVED, TIME_FIRST, decoder_of
from safeneuron.neurons.blocks import Block, Layer
from safeneuron.neurons.hooks import TokenStream, observed
from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.layout import HasNetwork, config_of, layers, network_of
from safeneuron.neurons.weights import changed
from safeneuron.runtime.offloading import device_of_inputs, is_offloaded, materialised

ROWS, TOKENS = 2, 6


class _Enough(Exception):  # noqa: N818 - not an error
    """The last layer of interest has been run."""


@dataclass(frozen=True)
class Proof:
    """What was tried: the layers whose neurons were probed, and of which of their parts the weights could not be."""

    probed: tuple[int, ...]
    unproved: tuple[str, ...]


def prove(model: nn.Module | HasNetwork) -> Proof:
    """Probe one layer of each kind that the model has; see the module.

    Takes a few forward passes over twelve tokens, most of them through the first layers only. Weights that are
    quantised or spread over processes are not touched, and what cannot be tried on them is named in the result; those
    that are offloaded are materialised.

    Args:
        model: The model, bare or wrapped; every bit of it is afterwards what it was.

    Returns:
        The layers that were probed, and what could not be.

    Raises:
        InputError: Where the model does not behave as its anatomy says, with what was found.
    """
    network = network_of(model)
    every = layers(network)
    kinds: dict[Any, Layer] = {}
    for layer in every:
        if layer.blocks:
            kinds.setdefault(_kind(layer), layer)
    if any(parameter.is_meta for parameter in network.parameters()) and not is_offloaded(network):
        return Proof((), ("weights that are not in memory",))
    unproved: list[str] = []
    with _resting(network), torch.no_grad():
        ran = _require_once(network, every)
        kinds = {kind: layer for kind, layer in kinds.items() if layer.index in ran}
        idle = [str(layer.index) for layer in every if layer.blocks and layer.index not in ran]
        if idle:
            unproved.append(f"layer {', '.join(idle)}, which text alone does not run")
        for layer in kinds.values():
            with materialised(layer.module):
                for block in layer.blocks:
                    unproved += _prove_block(network, layer, block)
                if not layer.is_plain:
                    _prove_routes(network, layer)
    return Proof(tuple(layer.index for layer in kinds.values()), tuple(dict.fromkeys(unproved)))


def settle_layout(model: nn.Module | HasNetwork) -> Proof:
    """``prove``, and find out what shapes do not say, which the config remembers from then on.

    That is whether the rows of fused matrices alternate, and whether the FFNs compute on (token, row, channel).

    Raises:
        InputError: As ``prove`` does, where neither helps.
    """
    network = network_of(model)
    configs: list[Any] = [config_of(network), decoder_of(network).config]
    try:
        return prove(network)
    except InputError as error:
        for mark in [INTERLEAVED, TIME_FIRST] if _has_open_order(network) else [TIME_FIRST]:
            if any(hasattr(config, mark) for config in configs):
                continue
            for config in configs:
                setattr(config, mark, True)
            try:
                return prove(network)
            except InputError:
                # The two may be one config.
                for config in configs:
                    if hasattr(config, mark):
                        delattr(config, mark)
        raise error


def _has_open_order(model: nn.Module | HasNetwork) -> bool:
    return any(block.has_open_order for layer in layers(model) for block in layer.blocks)


def _kind(layer: Layer) -> Any:
    """What layers have in common of which one stands for all."""
    parts = tuple(block.kind for block in layer.blocks)
    return type(layer.module), tuple(dict.fromkeys(parts)), len(parts)


@contextmanager
def _resting(network: nn.Module) -> Iterator[None]:
    """Within the block nothing is random: dropout and its like are off."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ids(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = _vocabulary(network)
    ids = torch.randint(size // 8, size // 2, (ROWS, TOKENS), generator=generator)
    device = next(network.parameters()).device
    embedding = next((module for module in decoder_of(network).modules() if isinstance(module, nn.Embedding)), None)
    if embedding is not None:
        device = embedding.weight.device
    return ids.to(device_of_inputs(network) or device)


def _vocabulary(network: nn.Module) -> int:
    config: Any = config_of(network)
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else 100


def run_network(network: nn.Module, last: nn.Module | None = None, turned: bool = False) -> None:
    """A few tokens through the decoder, up to and with the module ``last`` if given; ``turned`` swaps the rows."""
    decoder: Any = decoder_of(network)
    ids = _ids(network).flip(0) if turned else _ids(network)

    def stop(*_: Any) -> None:
        raise _Enough

    with ExitStack() as stack:
        if last is not None:
            stack.callback(last.register_forward_hook(stop).remove)
        with suppress(_Enough):
            decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _require_once(network: nn.Module, every: list[Layer]) -> set[int]:
    """The layers that run; ``InputError`` unless each of their FFNs runs once in a pass, over all tokens or some."""
    count: dict[tuple[int, int], int] = {}

    def tap(flow: TokenStream) -> None:
        flow.whole()
        count[flow.layer, flow.first] = count.get((flow.layer, flow.first), 0) + 1

    with observed(decoder_of(network), every, tap):
        try:
            run_network(network)
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the text decoder of {type(network).__name__} cannot be run on token ids alone "
                f"({type(error).__name__}: {reason}); this architecture is not supported"
            ) from error
    ran = {layer for layer, _ in count}
    for layer in every:
        for block in layer.blocks:
            times = count.get((layer.index, block.first), 0)
            if times > 1 or (times == 0 and not block.is_routed and layer.index in ran):
                raise _failed(network, layer, block, f"its FFN runs {times} times in one pass, where once was expected")
    return ran


def _prove_block(network: nn.Module, layer: Layer, block: Block) -> list[str]:
    """Probe the busiest neuron of a block; returns what could not be tried."""
    seen: dict[int, Tensor] = {}

    def look(flow: TokenStream) -> None:
        if _within(block, flow):
            seen[flow.first] = flow.activations.detach().clone().flatten(0, -2)

    def before_norm(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[block.first] = inputs[0].detach().clone().flatten(0, -2)

    def activations() -> dict[int, Tensor]:
        seen.clear()
        with ExitStack() as stack:
            if block.norm is None:
                stack.enter_context(observed(decoder_of(network), [layer], look))
            else:
                # What is scaled together is each neuron's own only before that.
                stack.callback(block.norm.register_forward_pre_hook(before_norm).remove)
            run_network(network, layer.module)
        return dict(seen)

    before = activations()
    if not before:
        # One expert of a list may well get no token of twelve; all of them cannot.
        return [f"the experts of layer {layer.index}, which got no token"] if block.is_mixture else []
    first = max(before, key=lambda key: float(before[key].abs().amax()))
    channel = int(before[first].abs().amax(dim=0).argmax())
    name = f"layer {layer.index} {block.name}".strip()
    if not block.is_readable:
        _prove_order(network, layer, block)
        return [f"the weights of {name}, which are quantised or spread"]
    _prove_column(network, layer, block, first, channel)
    _prove_rows(network, layer, block, first, channel, activations, before)
    if not block.is_routed:
        _prove_place(network, layer, block, activations, before[first])
    return []


def _prove_order(network: nn.Module, layer: Layer, block: Block) -> None:
    """The output projection must run after the matrices that write its input; no weights are needed to see that."""
    *writers, output = block.modules()
    if not writers:
        return
    ran: list[nn.Module] = []
    with ExitStack() as stack:
        for module in (*writers, output):
            stack.callback(module.register_forward_pre_hook(lambda module, _: ran.append(module)).remove)
        run_network(network, layer.module)
    if output in ran[: len(writers)] and len(ran) == len(writers) + 1:
        raise _failed(network, layer, block, "what was taken for its output projection runs before its other matrices")


def _within(block: Block, flow: TokenStream) -> bool:
    return block.first <= flow.first < block.first + block.neurons


def _prove_column(network: nn.Module, layer: Layer, block: Block, first: int, channel: int) -> None:
    def prune(flow: TokenStream) -> Tensor | None:
        if flow.first != first:
            return None
        index = torch.tensor([channel], device=flow.activations.device)
        return flow.activations.index_fill(-1, index, 0)

    plain = _output(network, layer)
    with observed(decoder_of(network), [layer], prune):
        by_hook = _output(network, layer)
    with changed(block.column(first - block.first + channel), torch.zeros_like):
        by_weight = _output(network, layer)
    gap, effect = _distance(by_hook, by_weight), _distance(plain, by_weight)
    if not gap <= max(0.05 * effect, _noise(plain)):
        raise _failed(
            network,
            layer,
            block,
            f"pruning neuron {first + channel} by hook moves the layer's output {gap:.3g} away from what zeroing its "
            f"column gives, which itself moves it by {effect:.3g}",
        )


def _prove_rows(
    network: nn.Module,
    layer: Layer,
    block: Block,
    first: int,
    channel: int,
    activations: Callable[[], dict[int, Tensor]],
    before: dict[int, Tensor],
) -> None:
    neuron = first - block.first + channel
    rows = block.rows(neuron)
    for row in rows:
        with changed(row, lambda values: values * 0.5 + 0.25 * values.abs().mean().clamp(min=0.01)):
            moved = _moved(before, activations())
        if moved != {(first, channel)}:
            others = len(moved - {(first, channel)})
            raise _failed(
                network,
                layer,
                block,
                f"changing a row of neuron {first + channel} changes "
                f"{'that neuron' if (first, channel) in moved else 'not that neuron'} and {others} others",
            )
    with ExitStack() as stack:
        for row in rows:
            stack.enter_context(changed(row, torch.zeros_like))
        for bias in block.biases(neuron):
            stack.enter_context(changed(bias, torch.zeros_like))
        constant = activations()[first][:, channel]
    if float((constant - constant[0]).abs().max()) > 1e-3 * float(before[first].abs().amax()):
        raise _failed(
            network, layer, block, f"neuron {first + channel} still varies from token to token with its rows at zero"
        )


def _prove_place(
    network: nn.Module, layer: Layer, block: Block, activations: Callable[[], dict[int, Tensor]], before: Tensor
) -> None:
    """Another first token, for the FFN alone, must change its activations there, and nowhere else."""

    def other(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0].clone()
        flat = values.view(ROWS, -1, values.shape[-1]) if values.shape[:-1].numel() == ROWS * TOKENS else values
        flat[:, 0] = flat[:, 0].flip(-1) + 0.5
        return (values, *inputs[1:])

    with ExitStack() as stack:
        for module in block.modules()[:-1]:
            stack.callback(module.register_forward_pre_hook(other).remove)
        after = activations()[block.first]
    moved = (after != before).any(dim=-1).view(ROWS, -1)
    if bool(moved[:, 1:].any()) or not bool(moved[:, 0].any()):
        raise _failed(network, layer, block, "its activation at a token is not computed from that token alone")


def _prove_routes(network: nn.Module, layer: Layer) -> None:
    """What is recorded of experts at a token must go with the row that it is in."""
    recordings = []
    for turned in (False, True):
        with recorded(network) as recording:
            run_network(network, layer.module, turned)
        if layer.index not in recording.layers:
            return
        recordings.append(recording.layers[layer.index].float())
    first, second = recordings[0], recordings[1].flip(0)
    gap = float((first - second).abs().nan_to_num().max())
    # Between experts of like scores rounding may decide.
    strays = float((first.isnan() != second.isnan()).float().mean())
    if gap > 0.02 * float(first.nan_to_num().abs().max()) or strays > 0.2:
        raise _failed(
            network,
            layer,
            layer.blocks[0],
            "what is recorded of its experts does not go with the tokens in the batch",
        )


def _output(network: nn.Module, layer: Layer) -> Tensor:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach().float())

    with ExitStack() as stack:
        stack.callback(layer.module.register_forward_hook(keep).remove)
        run_network(network, layer.module)
    return outputs[0]


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _noise(values: Tensor) -> float:
    """How far two ways to the same result may be apart."""
    return 2e-2 * float(values.abs().max()) * (1.0 if values.dtype != torch.float32 else 1e-2)


def _moved(before: dict[int, Tensor], after: dict[int, Tensor]) -> set[tuple[int, int]]:
    """The channels, by the first neuron of their FFN, that are not what they were."""
    moved = set()
    for first, values in before.items():
        other = after.get(first)
        if other is None or other.shape != values.shape:
            moved.add((first, -1))
            continue
        gap = (other - values).abs().amax(dim=0)
        precise = torch.finfo(values.dtype).eps * 8 * float(values.abs().amax())
        moved |= {(first, channel) for channel in (gap > precise).nonzero().flatten().tolist()}
    return moved


def _failed(network: nn.Module, layer: Layer, block: Block, problem: str) -> InputError:
    return InputError(
        f"layer {layer.index} ({type(layer.module).__name__}) of {type(network).__name__} is not what its matrices "
        f"look like: of the FFN in {block.name or 'the layer'} {problem}; this architecture is not supported"
    )
