"""What one neuron does: the tokens that it promotes, the prompts that excite it, and the categories that it answers to.

The tokens are read off the weights (its column of the output projection through the unembedding), so they say what the
neuron adds to the logits directly, not what later layers make of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.analysis.records import Number, PartRecord, TableRow
from safeneuron.analysis.settings import Effort
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.layout import feed_forwards, network_of
from safeneuron.neurons.linears import linear_in
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.inputs import measurement_of
from safeneuron.runtime.offloading import materialised
from safeneuron.selection.measurement import activations_of
from safeneuron.selection.scores import Scores


@dataclass(frozen=True)
class Portrait:
    """One neuron: ``promoted`` and ``suppressed`` tokens when it is more active, best first; prompts by activation.

    ``exciting`` are numbers of prompts, ``profile`` the mean activation of each category in standard deviations of
    this neuron over all prompts.
    """

    layer: int
    channel: int
    promoted: list[str]
    suppressed: list[str]
    exciting: list[int]
    profile: dict[str, float]


@dataclass(frozen=True)
class PortraitRecord:
    """A ``Portrait`` with the text of the prompts that excite the neuron, and its effect size ``d``."""

    layer: int
    channel: int
    promoted: list[str]
    suppressed: list[str]
    exciting: list[str]
    profile: dict[str, Number]
    d: Number


@dataclass(frozen=True)
class PortraitsRecord(PartRecord):
    """The numbers of the part ``neurons``: portraits of a state's neurons, the largest effect size first."""

    state: str
    neurons: list[PortraitRecord]

    def tables(self) -> dict[str, list[TableRow]]:
        """One row a neuron, without the prompts."""
        rows = [
            {
                "layer": portrait.layer,
                "channel": portrait.channel,
                "d": portrait.d,
                "promoted": " | ".join(portrait.promoted),
            }
            for portrait in self.neurons
        ]
        return {"neurons": rows}


def token_effects(model: Model, layer: int, channels: Tensor) -> Tensor:
    """What one more unit of activation adds to each logit, ``[neuron, vocabulary]`` float32, read off the weights.

        U (g * w),   w = the neuron's column of the output projection, g = scale of the final norm

    The size of the stream that the norm divides by is left out: it changes no order.

    Args:
        model: A Llama-like model.
        layer: The neurons' layer.
        channels: Their places in the layer, ``[neuron]``.

    Raises:
        InputError: For a model without an output embedding or a final norm.
    """
    network = network_of(model)
    block = feed_forwards(model)[layer]
    output = linear_in(block.output)
    with materialised(output):
        weight = output.weight
        columns = weight.detach().index_select(1, channels.to(weight.device)).float()
    head: Any = model.network.get_output_embeddings()  # type: ignore[no-untyped-call]
    norm = dict(decoder_of(network).named_children()).get("norm")
    if head is None or not isinstance(norm, nn.Module):
        raise InputError(
            f"{model.name} has no {'output embedding' if head is None else 'final norm'} to read tokens through; "
            "expected a Llama-like model"
        )
    with torch.inference_mode(), materialised(head):
        # The norm of a vector of ones is its scale, in whichever form the architecture keeps it (Gemma's is 1 + w).
        ones = torch.ones(columns.shape[0], device=columns.device, dtype=weight.dtype)
        scale = norm(ones).float()
        matrix: Tensor = head.weight
        tokens: Tensor = (scale[:, None] * columns).T.to(matrix.device) @ matrix.float().T
        return tokens.cpu()


def portraits(
    model: Model, neurons: NeuronSet, prompts: Sequence[Prompt], activations: Tensor, tokens: int = 8, examples: int = 3
) -> list[Portrait]:
    """A portrait of each neuron of the set, in its order.

    Args:
        model: The model.
        neurons: The set.
        prompts: Prompts with their categories.
        activations: Of these prompts and neurons, ``[prompt, neuron]``.
        tokens: How many promoted and suppressed tokens are named.
        examples: How many prompts are named.
    """
    if activations.shape != (len(prompts), len(neurons)):
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} for {len(prompts)} prompts and {len(neurons)} neurons"
        )
    categories = sorted({prompt.category for prompt in prompts})
    profiles = category_profiles(activations, [prompt.category for prompt in prompts], categories)
    order = activations.argsort(dim=0, descending=True, stable=True)[:examples]
    drawn: list[Portrait] = []
    for layer, channels in neurons.layers().items():
        effects = token_effects(model, layer, channels)
        for row, channel in enumerate(channels.tolist()):
            column = len(drawn)
            drawn.append(
                Portrait(
                    layer,
                    channel,
                    _tokens(model, effects[row].topk(tokens).indices),
                    _tokens(model, effects[row].topk(tokens, largest=False).indices),
                    order[:, column].tolist(),
                    dict(zip(categories, profiles[:, column].tolist(), strict=True)),
                )
            )
    return drawn


def category_profiles(activations: Tensor, labels: Sequence[str], categories: Sequence[str]) -> Tensor:
    """Mean activation of each category, ``[category, neuron]``, in deviations of the neuron from its mean over all.

    A neuron that never varies gets 0.
    """
    values = activations.double()
    deviation = values.std(dim=0)
    standard = (values - values.mean(dim=0)) / torch.where(deviation > 0, deviation, torch.inf)
    rows = [torch.tensor([label == category for label in labels]) for category in categories]
    return torch.stack([standard[which].mean(dim=0) for which in rows])


def _tokens(model: Model, ids: Tensor) -> list[str]:
    return [str(model.tokenizer.decode([int(number)])) for number in ids]


def portraits_record(
    config: Config,
    model: Model,
    *,
    state: str,
    neurons: NeuronSet,
    scores: Scores,
    prompts: Sequence[Prompt],
    effort: Effort,
) -> PortraitsRecord:
    """Portraits of the neurons of the set with the largest effect sizes, the largest first.

    Args:
        config: The run's config, for how activations are measured.
        model: The state's model.
        state: The state's name.
        neurons: Its set.
        scores: Its scores, for the effect sizes.
        prompts: The unsafe prompts, among which those that excite a neuron are found.
        effort: For how many neurons.
    """
    best = neurons.flat[scores.d[neurons.flat].sort(descending=True).indices[: effort.neurons]]
    chosen = NeuronSet(best.sort().values, neurons.widths, neurons.fingerprint, "portraits")
    activations = activations_of(model, prompts, chosen, measurement_of(config))
    records = [
        PortraitRecord(
            layer=portrait.layer,
            channel=portrait.channel,
            promoted=portrait.promoted,
            suppressed=portrait.suppressed,
            exciting=[prompts[index].text for index in portrait.exciting],
            profile=portrait.profile,
            d=float(scores.d[flat]),
        )
        for portrait, flat in zip(portraits(model, chosen, prompts, activations), chosen.flat.tolist(), strict=True)
    ]
    return PortraitsRecord(state, sorted(records, key=lambda record: -record.d))
