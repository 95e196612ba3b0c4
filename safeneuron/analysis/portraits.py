"""What one neuron does: the tokens that it promotes, the prompts that excite it, and the categories that it answers to.

The tokens are read off the weights (its column of the output projection through the unembedding), so they say what the
neuron adds to the logits directly, not what later layers make of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeneuron.analysis.settings import Effort
from safeneuron.config.schema import Config
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.layout import feed_forwards, network_of
from safeneuron.neurons.linears import linear_in
from safeneuron.neurons.neuron_set import NeuronSet
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


def token_effects(model: Model, layer: int, channels: Tensor) -> Tensor:
    """What one more unit of activation adds to each logit, ``[neuron, vocabulary]`` float32, read off the weights.

        U (g * w),   w = the neuron's column of the output projection, g = scale of the final norm

    The size of the stream that the norm divides by is left out: it changes no order. Raises ``InputError`` for a model
    without an output embedding or a final norm.
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
    """A portrait of each neuron of the set, in its order; ``activations`` is ``[prompt, neuron]`` of these neurons."""
    if activations.shape != (len(prompts), len(neurons)):
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} for {len(prompts)} prompts and {len(neurons)} neurons"
        )
    categories = sorted({prompt.category for prompt in prompts})
    profiles = category_profiles(activations, [prompt.category for prompt in prompts], categories)
    order = activations.argsort(dim=0, descending=True, stable=True)[:examples]
    found: list[Portrait] = []
    for layer, channels in neurons.layers().items():
        effects = token_effects(model, layer, channels)
        for row, channel in enumerate(channels.tolist()):
            column = len(found)
            found.append(
                Portrait(
                    layer,
                    channel,
                    _tokens(model, effects[row].topk(tokens).indices),
                    _tokens(model, effects[row].topk(tokens, largest=False).indices),
                    order[:, column].tolist(),
                    dict(zip(categories, profiles[:, column].tolist(), strict=True)),
                )
            )
    return found


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
    config: Config, model: Model, own: NeuronSet, scores: Scores, prompts: Sequence[Prompt], effort: Effort
) -> list[dict[str, Any]]:
    """Portraits of the neurons of the set with the largest effect sizes, the largest first."""
    table = config.measure
    best = own.flat[scores.d[own.flat].sort(descending=True).indices[: effort.neurons]]
    chosen = NeuronSet(best.sort().values, own.widths, own.fingerprint, "portraits")
    activations = activations_of(model, prompts, chosen, table.pooling, table.batch_tokens, table.max_tokens)
    found = [
        {**asdict(one), "d": float(scores.d[flat]), "exciting": [prompts[index].text for index in one.exciting]}
        for one, flat in zip(portraits(model, chosen, prompts, activations), chosen.flat.tolist(), strict=True)
    ]
    return sorted(found, key=lambda one: -one["d"])
