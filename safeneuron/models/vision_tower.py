"""The neurons of a vision-language model's eyes: the FFNs of its vision tower and projector, apart from the text's.

A set of them carries another fingerprint than the model's own neurons, so that neither is taken for the other. They can
be measured, selected and pruned; training never touches them (``aligning``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safeneuron.data.prompts import check_classes
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.models.vision import run_without_head, vision_parameters
from safeneuron.neurons.interventions import Change, Edit, everywhere, pruned, require_eager
from safeneuron.neurons.layout import network_of
from safeneuron.neurons.neuron_set import VISION_SUFFIX, NeuronSet
from safeneuron.neurons.statistics import ActivationStats, Moments
from safeneuron.runtime.progress import Progress

TOWER_POOLINGS = ("mean", "max")


class TowerFFN(NamedTuple):
    """An FFN of the eyes: where it lies in the model, how many neurons it has, and the projection that reads them."""

    name: str
    width: int
    output: nn.Linear


def towers_of(model: Model) -> list[TowerFFN]:
    """The FFNs of the vision tower and of the projector, in the order of the model's modules.

    An FFN is a module with two or three linear layers of its own, outside of attention, of which the last reads what
    the others write. Raises ``InputError`` for a model without any, such as a model of text.
    """
    network = network_of(model)
    sight = {id(parameter) for parameter in vision_parameters(network)}
    found = []
    for name, module in network.named_modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        if _is_feed_forward(name, module, linears) and id(linears[-1].weight) in sight:
            found.append(TowerFFN(name, linears[-1].in_features, linears[-1]))
    if not found:
        raise InputError(
            f"{model.name} has no FFN in a vision tower or projector: expected a vision-language model, found "
            f"{type(network).__name__}; its text decoder is measured with measure"
        )
    return found


def _is_feed_forward(name: str, module: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    if len(linears) not in (2, 3) or "attention" in type(module).__name__.lower() or "attn" in name.split(".")[-1]:
        return False
    *writers, reader = linears
    widths = {writer.out_features for writer in writers}
    return widths in ({reader.in_features}, {2 * reader.in_features}) and len({one.in_features for one in writers}) == 1


def fingerprint_of_towers(model: Model) -> str:
    """Whose neurons these are: the model's own fingerprint, marked."""
    return f"{model.fingerprint}{VISION_SUFFIX}"


def measure_towers(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    pooling: str = "mean",
    progress: Progress | None = None,
) -> ActivationStats:
    """Moments of every neuron of the eyes over both classes of prompts, which all have an image.

    Each prompt gives one vector an FFN: the ``mean`` or the ``max`` over the places of its picture. Prompts go through
    the model one by one, since families pack the places of several pictures in ways of their own; of several processes
    each does all the work. The result is for ``selecting.select``, like that of ``measuring.measure``.

    Raises ``InputError`` for a prompt without an image, another pooling, a class with fewer than 2 prompts, or
    activations that are not finite.
    """
    if pooling not in TOWER_POOLINGS:
        raise InputError(f"pooling {pooling!r} has no meaning for images; expected {' or '.join(TOWER_POOLINGS)}")
    check_classes(list(unsafe), list(safe))
    places, total, done = towers_of(model), len(unsafe) + len(safe), 0
    moments = []
    for prompts in (unsafe, safe):
        own = Moments.zero((sum(place.width for place in places),))
        for prompt in prompts:
            own = own.merge(Moments.of(_vector(model, places, prompt, pooling)[None]))
            done += 1
            if progress is not None:
                progress(done, total)
        moments.append(own)
    widths = tuple(place.width for place in places)
    return ActivationStats(moments[0], moments[1], widths, fingerprint_of_towers(model), pooling)


def _vector(model: Model, places: Sequence[TowerFFN], prompt: Prompt, pooling: str) -> Tensor:
    """One value for each neuron of the eyes, ``[neuron]``."""
    if prompt.image is None:
        raise InputError(
            f"{prompt.text[:60]!r} has no image, so there is nothing to see; give prompts with images, or as_image"
        )
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = inputs[0].detach().flatten(0, -2).float()
            seen[number] = (activations.mean(dim=0) if pooling == "mean" else activations.amax(dim=0)).cpu()

        return hook

    require_eager(model)
    handles = [place.output.register_forward_pre_hook(keep(number)) for number, place in enumerate(places)]
    try:
        with torch.inference_mode():
            run_without_head(model.network, model.inputs([model.ask(prompt)], "right"))
    finally:
        for handle in handles:
            handle.remove()
    vector = torch.cat([seen.get(number, torch.zeros(place.width)) for number, place in enumerate(places)])
    if not torch.isfinite(vector).all():
        raise InputError(
            f"the activations of the model's eyes are not finite on the prompt {prompt.text[:60]!r}; load it with "
            "dtype = 'float32', or use another checkpoint"
        )
    return vector


@contextmanager
def towers_pruned(model: Model, neurons: NeuronSet | Edit) -> Iterator[None]:
    """Within the block these neurons of the eyes are zero; the weights are not touched.

    An ``Edit`` does something else to its neurons. Raises ``InputError`` for a set that is not of this model's eyes.
    """
    places = towers_of(model)
    edit = Edit.zero(neurons) if isinstance(neurons, NeuronSet) else neurons
    edit.neurons.require(fingerprint_of_towers(model), tuple(place.width for place in places))

    def hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, inputs: (change(inputs[0]), *inputs[1:])

    require_eager(model)
    changes = {number: everywhere(edit, number) for number in edit.neurons.layers()}
    handles = [
        places[number].output.register_forward_pre_hook(hook(change))
        for number, change in changes.items()
        if change is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pruned_anywhere(model: Model, neurons: NeuronSet | Edit | None) -> AbstractContextManager[None]:
    """``towers_pruned`` for neurons of the eyes, ``ffn.pruned`` for those of the text decoder, by their fingerprint."""
    if neurons is None:
        return pruned(model, None)
    chosen = neurons.neurons if isinstance(neurons, Edit) else neurons
    return (towers_pruned if chosen.fingerprint.endswith(VISION_SUFFIX) else pruned)(model, neurons)
