"""The neurons of a vision-language model's vision tower and projector, apart from those of its text decoder.

A set of them carries another fingerprint than the model's own neurons, so that neither is taken for the other. They can
be measured, selected and pruned; training never touches them.
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
from safeneuron.models.forward import forward_batches
from safeneuron.models.model import Model
from safeneuron.models.vision import run_without_head, vision_parameters
from safeneuron.neurons.interventions import Change, Edit, everywhere, pruned, require_eager
from safeneuron.neurons.layout import network_of
from safeneuron.neurons.neuron_set import VISION_SUFFIX, NeuronSet
from safeneuron.neurons.statistics import ActivationStats, Moments
from safeneuron.runtime import distributed
from safeneuron.runtime.progress import Progress, progress_of_section

TOWER_POOLINGS = ("mean", "max")


class TowerFFN(NamedTuple):
    """An FFN of the vision tower or projector: its name, its number of neurons, and the projection that reads them."""

    name: str
    width: int
    output: nn.Linear


def towers_of(model: Model) -> list[TowerFFN]:
    """The FFNs of the vision tower and of the projector, in the order of the model's modules.

    An FFN is a module with two or three linear layers of its own, outside of attention, of which the last reads what
    the others write.

    Args:
        model: A vision-language model.

    Returns:
        One entry an FFN; its place in the list is the layer of its neurons in sets and statistics.

    Raises:
        InputError: For a model without any, such as a model of text.
    """
    network = network_of(model)
    of_vision = {id(parameter) for parameter in vision_parameters(network)}
    towers = []
    for name, module in network.named_modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        if _is_feed_forward(name, module, linears) and id(linears[-1].weight) in of_vision:
            towers.append(TowerFFN(name, linears[-1].in_features, linears[-1]))
    if not towers:
        raise InputError(
            f"{model.name} has no FFN in a vision tower or projector: expected a vision-language model, found "
            f"{type(network).__name__}; its text decoder is measured with measure"
        )
    return towers


def _is_feed_forward(name: str, module: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    if len(linears) not in (2, 3) or "attention" in type(module).__name__.lower() or "attn" in name.split(".")[-1]:
        return False
    *writers, reader = linears
    widths = {writer.out_features for writer in writers}
    return (
        widths in ({reader.in_features}, {2 * reader.in_features})
        and len({writer.in_features for writer in writers}) == 1
    )


def fingerprint_of_towers(model: Model) -> str:
    """Whose neurons these are: the model's own fingerprint, marked."""
    return f"{model.fingerprint}{VISION_SUFFIX}"


def measure_towers(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    pooling: str = "mean",
    *,
    progress: Progress | None = None,
) -> ActivationStats:
    """Moments of every neuron of the vision tower and projector over both classes of prompts, which all have an image.

    Prompts go through the model one by one, since families pack the patches of several pictures in ways of their own;
    of several ranks each does all the work. The result is for ``scores.select``, like that of ``measurement.measure``.

    Args:
        model: A vision-language model.
        unsafe: Harmful prompts with images, at least 2.
        safe: Harmless prompts with images, at least 2.
        pooling: What an FFN's vector is of a prompt: the ``mean`` or the ``max`` over the patches of its picture.
        progress: Called after each prompt with the number of prompts done, of both classes.

    Returns:
        Moments ``[neuron]`` of each class, float64; the layers are the FFNs of ``towers_of``.

    Raises:
        InputError: For a prompt without an image, another pooling, a class with fewer than 2 prompts, a model without
            such FFNs, or activations that are not finite.
    """
    if pooling not in TOWER_POOLINGS:
        raise InputError(f"pooling {pooling!r} has no meaning for images; expected {' or '.join(TOWER_POOLINGS)}")
    check_classes(list(unsafe), list(safe))
    towers, total = towers_of(model), len(unsafe) + len(safe)
    for prompt in (*unsafe, *safe):
        if prompt.image is None:
            raise InputError(
                f"{prompt.text[:60]!r} has no image, so a vision tower has no activations; give prompts with images, "
                "or as_image"
            )
    widths = tuple(tower.width for tower in towers)
    require_eager(model)
    moments = []
    with distributed.alone():
        for prompts, before in ((unsafe, 0), (safe, len(unsafe))):
            merged = Moments.zero((sum(widths),))
            for _, vectors in forward_batches(
                model,
                prompts,
                lambda rows: _pooled_patches(model, towers, rows, pooling),
                lambda encoded: ([index] for index in range(len(encoded))),
                progress=progress_of_section(progress, before, total),
                what="the activations of the model's vision tower are",
            ):
                merged = merged.merge(Moments.of(vectors))
            moments.append(merged)
    return ActivationStats(moments[0], moments[1], widths, fingerprint_of_towers(model), pooling)


def _pooled_patches(model: Model, towers: Sequence[TowerFFN], batch: Sequence[list[int]], pooling: str) -> Tensor:
    """One value for each neuron of the vision tower, ``[1, neuron]``, of one encoded prompt."""
    vectors: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = inputs[0].detach().flatten(0, -2).float()
            vectors[number] = (activations.mean(dim=0) if pooling == "mean" else activations.amax(dim=0)).cpu()

        return hook

    handles = [tower.output.register_forward_pre_hook(keep(number)) for number, tower in enumerate(towers)]
    try:
        with torch.inference_mode():
            run_without_head(model.network, model.inputs(batch, "right"))
    finally:
        for handle in handles:
            handle.remove()
    # What some families leave out, such as the projector of another kind of picture, is zero.
    vector = torch.cat([vectors.get(number, torch.zeros(tower.width)) for number, tower in enumerate(towers)])
    return vector.nan_to_num(torch.inf, torch.inf, -torch.inf)[None]


@contextmanager
def towers_pruned(model: Model, neurons: NeuronSet | Edit) -> Iterator[None]:
    """Within the block these neurons of the vision tower are zero; the weights are not touched.

    Args:
        model: A vision-language model.
        neurons: A set, or an ``Edit``, which does something else to its neurons.

    Raises:
        InputError: For a set that is not of this model's vision tower.
    """
    towers = towers_of(model)
    edit = Edit.zero(neurons) if isinstance(neurons, NeuronSet) else neurons
    edit.neurons.require(fingerprint_of_towers(model), tuple(tower.width for tower in towers))

    def hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, inputs: (change(inputs[0]), *inputs[1:])

    require_eager(model)
    changes = {number: everywhere(edit, number) for number in edit.neurons.layers()}
    handles = [
        towers[number].output.register_forward_pre_hook(hook(change))
        for number, change in changes.items()
        if change is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pruned_anywhere(model: Model, neurons: NeuronSet | Edit | None) -> AbstractContextManager[None]:
    """``towers_pruned`` or ``pruned``, as the fingerprint says: neurons of the vision tower, or of the text decoder."""
    if neurons is None:
        return pruned(model, None)
    chosen = neurons.neurons if isinstance(neurons, Edit) else neurons
    return (towers_pruned if chosen.fingerprint.endswith(VISION_SUFFIX) else pruned)(model, neurons)
