"""What a training changed: neurons kept, lost and new, and how far each layer's weights moved inside a set and outside.

The weights before are read lazily, one parameter at a time, from a folder in Hugging Face form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from safeneuron.analysis.settings import Classes, Record
from safeneuron.attacks.refusal_direction import decoder_layers, last_of_stream
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import length_batches, prompts_alone
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import network_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runtime.files import read_json
from safeneuron.runtime.progress import Progress
from safeneuron.selection.linear_probe import held_out_accuracy


class Turnover(NamedTuple):
    """Neurons of each layer that both states' sets hold, only the first one's, and only the second one's."""

    kept: list[int]
    lost: list[int]
    new: list[int]


class Movement(NamedTuple):
    """Relative L2 change |after - before| / |before| of one layer's neurons inside a set and outside of it.

    nan where there is no neuron, or nothing but zeros before.
    """

    layer: int
    inside: float
    outside: float


def turnover(before: NeuronSet, after: NeuronSet) -> Turnover:
    """What has become of the neurons found on a state, found again on a later one."""
    return Turnover((before & after).counts, (before - after).counts, (after - before).counts)


def movements(after: Model, before: Callable[[str], Tensor], neurons: NeuronSet) -> list[Movement]:
    """How far the weights that neurons own (gate and up rows, biases, down columns) moved, layer by layer.

    ``before(name)`` gives the parameter of that name as it was; see ``weights_in``. Raises ``InputError`` for a neuron
    set of another model.
    """
    neurons.require(after.fingerprint, after.widths)
    found = []
    for layer, width in enumerate(after.widths):
        every = NeuronSet.of({layer: range(width)}, after.widths, after.fingerprint)
        change, size = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for piece in owned_slices(after, every):
            now = _by_neuron(piece.parameter.detach().index_select(piece.dim, piece.index), piece.dim, width)
            old = before(piece.name).to(piece.parameter.device).index_select(piece.dim, piece.index)
            was = _by_neuron(old, piece.dim, width)
            change += (now - was).square().sum(dim=1).cpu()
            size += was.square().sum(dim=1).cpu()
        inside = torch.zeros(width, dtype=torch.bool).index_fill(0, neurons.layer(layer), True)
        found.append(Movement(layer, _relative(change, size, inside), _relative(change, size, ~inside)))
    return found


def weights_in(folder: Path) -> Callable[[str], Tensor]:
    """A reader of single parameters from a folder's safetensors; nothing is read but what is asked for.

    Raises ``InputError`` for a folder without safetensors, and when asked for a parameter that it does not hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), folder / "model.safetensors")
    else:
        raise InputError(f"{folder} holds no safetensors to compare with; expected model.safetensors or its index")

    def read(name: str) -> Tensor:
        if name not in files:
            raise InputError(f"{folder} has no parameter {name}; expected a checkpoint of the same architecture")
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read


def _by_neuron(values: Tensor, dim: int, width: int) -> Tensor:
    """``[neuron, value]`` of a slice; of a fused matrix each neuron has several rows, one part after the other."""
    parts = values.to(torch.float64).movedim(dim, 0).reshape(-1, width, values.numel() // values.shape[dim])
    return parts.movedim(0, 1).reshape(width, -1)


def _relative(change: Tensor, size: Tensor, which: Tensor) -> float:
    total = float(size[which].sum())
    return (float(change[which].sum()) / total) ** 0.5 if total > 0 else float("nan")


def by_layer(states: Sequence[Record]) -> list[Record]:
    """One row a state and layer."""
    plain = [key for key, value in states[0].items() if isinstance(value, list) and key != "moved"]
    return [
        {"state": one["state"], "layer": layer}
        | {name: counts[layer] for name, counts in one["turnover"].items()}
        | {f"moved_{side}": one["moved"][layer][side] if one["moved"] else None for side in ("inside", "outside")}
        | {key: one[key][layer] for key in plain}
        for one in states
        for layer in range(len(one["turnover"]["kept"]))
    ]


def hidden_states(
    model: Model,
    prompts: Sequence[Prompt],
    batch_tokens: int = 2048,
    max_tokens: int = 1024,
    progress: Progress | None = None,
) -> Tensor:
    """``[prompt, layer, hidden]`` float32: the residual stream at each layer's input, at the last token of each prompt.

    One vector a prompt and layer is kept, so choose how many prompts. Raises ``InputError`` if they are not finite.
    """
    layers = decoder_layers(network_of(model))
    encoded = [one.ids for one in prompts_alone(model, prompts, max_tokens)]
    found: dict[int, Tensor] = {}
    for batch in length_batches(encoded, batch_tokens):
        states = last_of_stream(model, layers, [encoded[index] for index in batch]).float()
        found.update(zip(batch, states, strict=True))
        if progress is not None:
            progress(len(found), len(prompts))
    stacked = torch.stack([found[index] for index in range(len(prompts))])
    if not torch.isfinite(stacked).all():
        raise InputError("the model's residual stream is not finite on some prompts; load it with dtype = 'float32'")
    return stacked


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two representations ``[prompt, *]`` of the same prompts, at least 4.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X X', L = Y Y'

    (Kornblith et al. 2019) with the unbiased estimate of HSIC (Song et al. 2012), since with fewer prompts than
    dimensions the usual one is near 1 for anything. 1: the same but for rotation and scale; around 0: unrelated, and
    then it may be a little below. nan if one does not vary.
    """
    kernels = [_kernel(states) for states in (first, second)]
    cross, one, other = (_hsic(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    return cross / math.sqrt(one * other) if one > 0 and other > 0 else math.nan


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """The mean over prompts of the cosine of their two states ``[prompt, hidden]``."""
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1).mean())


def projections(unsafe: Tensor, safe: Tensor, directions: Tensor) -> list[float]:
    """How far the class means lie apart along a unit vector of each layer, in units of the spread along it.

        (mean unsafe - mean safe) . r / s,   s = pooled standard deviation of x . r

    ``unsafe`` and ``safe`` are ``[prompt, layer, hidden]``, ``directions`` is ``[layer, hidden]``: give those of an
    earlier state to see whether a training has kept its refusal direction. nan where nothing varies.
    """
    found = []
    for layer, direction in enumerate(directions.double()):
        one, other = (states[:, layer].double() @ direction for states in (unsafe, safe))
        spread = ((one.var() * (len(one) - 1) + other.var() * (len(other) - 1)) / (len(one) + len(other) - 2)).sqrt()
        found.append(float((one.mean() - other.mean()) / spread) if spread > 1e-9 else math.nan)
    return found


def mean_directions(unsafe: Tensor, safe: Tensor) -> Tensor:
    """The unit difference of the class means at each layer, ``[layer, hidden]`` float64; zeros where they are equal."""
    return torch.nn.functional.normalize(unsafe.double().mean(dim=0) - safe.double().mean(dim=0), dim=1)


def separability(unsafe: Tensor, safe: Tensor, seed: int = 0) -> list[float]:
    """For each layer the share of prompts that a linear probe puts in the right class without having seen them."""
    signs = torch.cat([torch.ones(len(unsafe)), -torch.ones(len(safe))]).double()
    both = torch.cat([unsafe, safe]).double()
    return [held_out_accuracy(both[:, layer], signs, seed=seed) for layer in range(both.shape[1])]


def _kernel(states: Tensor) -> Tensor:
    """X X' of the centred states, without its diagonal."""
    values = states.double() - states.double().mean(dim=0)
    return (values @ values.T).fill_diagonal_(0)


def _hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5)."""
    n = len(first)
    if n < 4:
        raise ValueError(f"the estimate needs four prompts, found {n}")
    trace = (first * second).sum()
    outer = first.sum() * second.sum() / ((n - 1) * (n - 2))
    cross = first.sum(dim=0) @ second.sum(dim=0) * 2 / (n - 2)
    return float((trace + outer - cross) / (n * (n - 3)))


@dataclass(frozen=True)
class Observation:
    """Hidden states ``[prompt, layer, hidden]`` of a model on both classes of prompts, and with its set pruned."""

    intact: tuple[Any, Any]
    without: tuple[Any, Any]


def observe(model: Model, classes: Classes, own: NeuronSet, progress: Progress | None = None) -> Observation:
    """What a state's residual stream holds at the last token of each prompt."""
    intact = (hidden_states(model, classes[0], progress=progress), hidden_states(model, classes[1]))
    with pruned(model, own):
        without = (hidden_states(model, classes[0]), hidden_states(model, classes[1]))
    return Observation(intact, without)


def state_record(now: Observation, base: Observation, own: NeuronSet, first: NeuronSet, seed: int) -> dict[str, Any]:
    """A state beside T0: its set, its hidden states, its refusal direction, and how well harm can be told in it."""
    layers = range(now.intact[0].shape[1])
    pairs = list(zip(now.intact, base.intact, strict=True))
    return {
        "turnover": turnover(first, own)._asdict(),
        "jaccard_with_T0": own.jaccard(first),
        **{
            f"{name}_{kind}": [_number(function(one[:, layer], other[:, layer])) for layer in layers]
            for kind, (one, other) in zip(("unsafe", "safe"), pairs, strict=True)
            for name, function in (("cka", linear_cka), ("cosine", mean_cosine))
        },
        "along_own": _numbers(projections(*now.intact, mean_directions(*now.intact))),
        "along_T0": _numbers(projections(*now.intact, mean_directions(*base.intact))),
        "separability": separability(*now.intact, seed),
        "separability_pruned": separability(*now.without, seed),
    }


def movement_record(model: Model, folder: Path, neurons: NeuronSet) -> list[dict[str, Any]]:
    """How far the weights of each layer moved from the checkpoint in ``folder``, inside the set and outside."""
    return [_plain(one) for one in movements(model, weights_in(folder), neurons)]


def _plain(one: Movement) -> dict[str, Any]:
    return {"layer": one.layer, "inside": _number(one.inside), "outside": _number(one.outside)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]
