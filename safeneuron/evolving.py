"""A trained state beside T0, as records for JSON: its set, its weights, its hidden states, its refusal direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron.drifting import Movement, movements, turnover, weights_in
from safeneuron.ffn import pruned
from safeneuron.inspecting import Classes
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.representations import (
    hidden_states,
    linear_cka,
    mean_cosine,
    mean_directions,
    projections,
    separability,
)
from safeneuron.streaming import Progress


@dataclass(frozen=True)
class Seen:
    """Hidden states ``[prompt, layer, hidden]`` of a model on both classes of prompts, and with its set pruned."""

    intact: tuple[Any, Any]
    without: tuple[Any, Any]


def seen(model: Model, classes: Classes, own: NeuronSet, progress: Progress | None = None) -> Seen:
    """What a state's residual stream holds at the last token of each prompt."""
    intact = (hidden_states(model, classes[0], progress=progress), hidden_states(model, classes[1]))
    with pruned(model, own):
        without = (hidden_states(model, classes[0]), hidden_states(model, classes[1]))
    return Seen(intact, without)


def state_record(now: Seen, base: Seen, own: NeuronSet, first: NeuronSet, seed: int) -> dict[str, Any]:
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


def moved_record(model: Model, folder: Path, neurons: NeuronSet) -> list[dict[str, Any]]:
    """How far the weights of each layer moved from the checkpoint in ``folder``, inside the set and outside."""
    return [_plain(one) for one in movements(model, weights_in(folder), neurons)]


def _plain(one: Movement) -> dict[str, Any]:
    return {"layer": one.layer, "inside": _number(one.inside), "outside": _number(one.outside)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]
