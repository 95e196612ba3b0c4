"""Many attacks on one model for little more than the price of a few: their answers are generated in shared batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safeneuron.data import Prompt
from safeneuron.edits import Edit
from safeneuron.errors import InputError
from safeneuron.ffn import edited
from safeneuron.models import Model, generate
from safeneuron.neurons import NeuronSet

Progress = Callable[[int, int], None]


def sweep(
    model: Model,
    prompts: Sequence[Prompt],
    attacks: Sequence[NeuronSet | Edit | None],
    max_new_tokens: int = 128,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> list[list[str]]:
    """The greedy answers of the model under each attack: of each a list in the order of the prompts.

    A neuron set is pruned, ``None`` leaves the model as it is. Each row of a batch of ``batch_size`` is one prompt
    under one attack, the copies of a prompt side by side, so that K attacks take K times the tokens but share the
    passes. The answers are those of each attack alone, up to rounding: other batch shapes may round otherwise, which
    in bfloat16 can tip a close choice between two tokens. ``progress(done, total)`` counts answers. Several ranks
    share the batches. Raises ``InputError`` for no prompts, no attacks, or a set of another model.
    """
    if not prompts or not attacks:
        raise InputError(f"a sweep needs prompts and attacks, found {len(prompts)} and {len(attacks)}")
    edits = [Edit.zero(attack) if isinstance(attack, NeuronSet) else attack for attack in attacks]
    encoded = [model.ask(prompt) for prompt in prompts]
    # Batches are sorted by length, and rows of one length by number, so the copies of a prompt stay together.
    rows = [ids for ids in encoded for _ in edits]
    found = [[""] * len(prompts) for _ in edits]
    done = 0
    for batch in generate(
        model,
        rows,
        max_new_tokens,
        batch_size,
        within=lambda indices: edited(model, edits, [index % len(edits) for index in indices]),
    ):
        for index, text in batch:
            found[index % len(edits)][index // len(edits)] = text
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return found


def each_neuron(neurons: NeuronSet) -> list[NeuronSet]:
    """A set of one neuron for every neuron of the set, in order, labelled ``LAYER.CHANNEL``."""
    return [
        NeuronSet.of({layer: [channel]}, neurons.widths, neurons.fingerprint, f"{layer}.{channel}")
        for layer, channels in neurons.layers().items()
        for channel in channels.tolist()
    ]


def each_layer(neurons: NeuronSet) -> list[NeuronSet]:
    """The part of the set in every layer that has any, labelled ``layer LAYER``."""
    return [
        NeuronSet.of({layer: channels.tolist()}, neurons.widths, neurons.fingerprint, f"layer {layer}")
        for layer, channels in neurons.layers().items()
    ]
