"""What a training changed: neurons kept, lost and new, and how far each layer's weights moved inside a set and outside.

The weights before are read lazily, one parameter at a time, from a folder in Hugging Face form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from safeneuron.analysis.records import JsonRecord, Number, PartRecord, TableRow
from safeneuron.analysis.settings import Classes
from safeneuron.attacks.refusal_direction import decoder_layers, last_of_stream
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import MeasurementSettings, forward_batches
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import network_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runtime import distributed
from safeneuron.runtime.files import read_json
from safeneuron.runtime.progress import Progress
from safeneuron.selection.linear_probe import held_out_accuracy


@dataclass(frozen=True)
class Turnover:
    """Neurons of each layer that both states' sets hold, only the first one's, and only the second one's."""

    kept: list[int]
    lost: list[int]
    new: list[int]


@dataclass(frozen=True)
class Movement:
    """Relative L2 change |after - before| / |before| of one layer's neurons inside a set and outside of it.

    nan where there is no neuron, or nothing but zeros before.
    """

    layer: int
    inside: Number
    outside: Number


@dataclass(frozen=True)
class StateRecord(JsonRecord):
    """A state beside T0; lists have one entry a layer.

    ``cka`` and ``cosine`` hold its hidden states against T0's on both classes of prompts; ``along_own`` and
    ``along_T0`` the distance of the classes along its own refusal direction and along T0's, in standard deviations.
    ``separability`` is the accuracy of a linear probe, intact and with the state's set pruned. ``moved`` is None where
    weights were not compared.
    """

    state: str
    turnover: Turnover
    jaccard_with_T0: Number  # noqa: N815 (the name in the files)
    cka_unsafe: list[Number]
    cosine_unsafe: list[Number]
    cka_safe: list[Number]
    cosine_safe: list[Number]
    along_own: list[Number]
    along_T0: list[Number]  # noqa: N815
    separability: list[Number]
    separability_pruned: list[Number]
    moved: list[Movement] | None

    def rows(self) -> list[TableRow]:
        """One row a layer."""
        return [
            {
                "state": self.state,
                "layer": layer,
                "kept": self.turnover.kept[layer],
                "lost": self.turnover.lost[layer],
                "new": self.turnover.new[layer],
                "moved_inside": self.moved[layer].inside if self.moved else None,
                "moved_outside": self.moved[layer].outside if self.moved else None,
                "cka_unsafe": self.cka_unsafe[layer],
                "cosine_unsafe": self.cosine_unsafe[layer],
                "cka_safe": self.cka_safe[layer],
                "cosine_safe": self.cosine_safe[layer],
                "along_own": self.along_own[layer],
                "along_T0": self.along_T0[layer],
                "separability": self.separability[layer],
                "separability_pruned": self.separability_pruned[layer],
            }
            for layer in range(len(self.turnover.kept))
        ]


@dataclass(frozen=True)
class StatesRecord(PartRecord):
    """The numbers of the part ``states``: how many unsafe and safe prompts were read, and each state beside T0."""

    prompts: list[int]
    states: list[StateRecord]

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a state and layer."""
        return {"states": [row for state in self.states for row in state.rows()]}


def turnover(before: NeuronSet, after: NeuronSet) -> Turnover:
    """What has become of the neurons found on a state, found again on a later one."""
    return Turnover((before & after).counts, (before - after).counts, (after - before).counts)


def movements(after: Model, before: Callable[[str], Tensor], neurons: NeuronSet) -> list[Movement]:
    """How far the weights that neurons own (gate and up rows, biases, down columns) moved, layer by layer.

    Args:
        after: The trained model.
        before: Gives the parameter of a name as it was; see ``parameter_reader``.
        neurons: The set.

    Returns:
        One movement a layer.

    Raises:
        InputError: For a neuron set of another model.
    """
    neurons.require(after.fingerprint, after.widths)
    moved = []
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
        moved.append(Movement(layer, _relative(change, size, inside), _relative(change, size, ~inside)))
    return moved


def parameter_reader(folder: Path) -> Callable[[str], Tensor]:
    """A reader of single parameters from a folder's safetensors; nothing is read but what is asked for.

    Args:
        folder: A checkpoint in Hugging Face form.

    Returns:
        From a parameter's name to its values.

    Raises:
        InputError: For a folder without safetensors, and when asked for a parameter that it does not hold.
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


def hidden_states(
    model: Model,
    prompts: Sequence[Prompt],
    settings: MeasurementSettings = MeasurementSettings(),
    *,
    progress: Progress | None = None,
) -> Tensor:
    """The residual stream at each layer's input, at the last token of each prompt; every rank does all of it.

    One vector a prompt and layer is kept, so choose how many prompts.

    Args:
        model: The model, in evaluation mode.
        prompts: The prompts.
        settings: How many tokens a batch and a prompt may have.
        progress: Called after each batch.

    Returns:
        ``[prompt, layer, hidden]`` float32, in the order of the prompts.

    Raises:
        InputError: If the stream is not finite.
    """
    layers = decoder_layers(network_of(model))
    states: dict[int, Tensor] = {}
    with distributed.alone():
        for batch, vectors in forward_batches(
            model,
            prompts,
            lambda rows: last_of_stream(model, layers, rows).float(),
            settings.batches,
            max_tokens=settings.max_tokens,
            progress=progress,
            what="the model's residual stream is",
        ):
            states.update(zip(batch, vectors, strict=True))
    return torch.stack([states[index] for index in range(len(prompts))])


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two representations ``[prompt, *]`` of the same prompts, at least 4.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X X', L = Y Y'

    (Kornblith et al. 2019) with the unbiased estimate of HSIC (Song et al. 2012), since with fewer prompts than
    dimensions the usual one is near 1 for anything. 1: the same but for rotation and scale; around 0: unrelated, and
    then it may be a little below. nan if one does not vary.
    """
    kernels = [_kernel(states) for states in (first, second)]
    cross, within_first, within_second = (_hsic(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    varies = within_first > 0 and within_second > 0
    return cross / math.sqrt(within_first * within_second) if varies else math.nan


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """The mean over prompts of the cosine of their two states ``[prompt, hidden]``."""
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1).mean())


def projections(unsafe: Tensor, safe: Tensor, directions: Tensor) -> list[float]:
    """How far the class means lie apart along a unit vector of each layer, in units of the spread along it.

        (mean unsafe - mean safe) . r / s,   s = pooled standard deviation of x . r

    ``unsafe`` and ``safe`` are ``[prompt, layer, hidden]``, ``directions`` is ``[layer, hidden]``: give those of an
    earlier state to see whether a training has kept its refusal direction. nan where nothing varies.
    """
    distances = []
    for layer, direction in enumerate(directions.double()):
        harm, none = (states[:, layer].double() @ direction for states in (unsafe, safe))
        spread = ((harm.var() * (len(harm) - 1) + none.var() * (len(none) - 1)) / (len(harm) + len(none) - 2)).sqrt()
        distances.append(float((harm.mean() - none.mean()) / spread) if spread > 1e-9 else math.nan)
    return distances


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

    intact: tuple[Tensor, Tensor]
    without: tuple[Tensor, Tensor]


def observe(model: Model, classes: Classes, neurons: NeuronSet, progress: Progress | None = None) -> Observation:
    """What a state's residual stream holds at the last token of each prompt, intact and with ``neurons`` pruned."""
    intact = (hidden_states(model, classes[0], progress=progress), hidden_states(model, classes[1]))
    with pruned(model, neurons):
        without = (hidden_states(model, classes[0]), hidden_states(model, classes[1]))
    return Observation(intact, without)


def state_record(
    name: str,
    neurons: NeuronSet,
    observed: Observation,
    *,
    base_neurons: NeuronSet,
    base: Observation,
    moved: list[Movement] | None,
    seed: int,
) -> StateRecord:
    """A state beside T0: its set, its hidden states, its refusal direction, and how well harm can be told in it.

    Args:
        name: The state's name.
        neurons: Its set.
        observed: Its hidden states.
        base_neurons: The set of T0.
        base: The hidden states of T0, on the same prompts.
        moved: How far its weights moved since T0, by ``movements``; None if they were not compared.
        seed: For the folds of the linear probe.
    """
    layers = range(observed.intact[0].shape[1])

    def alike(measure: Callable[[Tensor, Tensor], float], side: int) -> list[float]:
        pair = (observed.intact[side], base.intact[side])
        return [measure(*(states[:, layer] for states in pair)) for layer in layers]

    return StateRecord(
        state=name,
        turnover=turnover(base_neurons, neurons),
        jaccard_with_T0=neurons.jaccard(base_neurons),
        cka_unsafe=alike(linear_cka, 0),
        cosine_unsafe=alike(mean_cosine, 0),
        cka_safe=alike(linear_cka, 1),
        cosine_safe=alike(mean_cosine, 1),
        along_own=projections(*observed.intact, mean_directions(*observed.intact)),
        along_T0=projections(*observed.intact, mean_directions(*base.intact)),
        separability=separability(*observed.intact, seed),
        separability_pruned=separability(*observed.without, seed),
        moved=moved,
    )
