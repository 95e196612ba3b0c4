"""A tiny chat model whose refusals are wired by hand to known neurons, so that one knows what an attack must find.

A request with exclamation marks is "harmful" to it. The first layer's attention takes their share of the request to
where the answer is made; the planted neurons, five of 144, multiply that with "an answer is being made", and push the
logit of ``N``. Without that push the answer is ``Yes``. So it refuses with ``NNN...`` and complies with ``Yes``. All
other neurons compute noise from what else stands in the request, and write it where no answer hangs on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import nn

from safeneuron.attacks.pruning import respond
from safeneuron.data.types import Prompt
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.neuron_set import NeuronSet
from tests.helpers import tiny

PLANTED = {1: [5, 17, 40], 2: [9, 33]}
GROUPS = ({1: [5, 17, 40]}, {2: [9, 33, 21]})
"""Two disjoint groups on which refusal can be wired."""
REFUSAL, COMPLIANCE = "NNNN", "Yes"
# Dimensions of the residual stream that mean something; those from CONTENT on are noise.
HARM, SEEN, ASSISTANT, NO, YES_1, YES_2, YES_3, PUSH, CONTENT = range(9)


def model() -> Model:
    """The planted chat model, a Llama in float32."""
    planted = tiny.model(num_attention_heads=4)
    network, ids = planted.network, planted.tokenizer.convert_tokens_to_ids
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
        embedding[:, CONTENT:] = 0.4 * torch.randn(len(embedding), tiny.HIDDEN - CONTENT)
        chain = [(ASSISTANT, "<|assistant|>"), (YES_1, "Y"), (YES_2, "e"), (YES_3, "s"), (None, "<|end|>")]
        for (place, token), (_, following) in itertools.pairwise(chain):
            embedding[ids(token), place] = 1
            head[ids(following), place] = 4
        embedding[ids("!")] = 0
        embedding[ids("!"), HARM] = 1
        embedding[ids("N"), NO] = 1
        head[ids("N"), PUSH] = 12
        _wire_attention(network)
        for layer in range(tiny.LAYERS):
            _wire_ffn(network.model.layers[layer].mlp, PLANTED.get(layer, []))
    return planted


def two_groups(wiring: str) -> Model:
    """The planted model with its refusal wired to the two ``GROUPS``.

    ``series``: the second group sees only what the first one writes, so that both are needed. ``parallel``: either
    suffices, since each alone pushes enough.
    """
    wired = model()
    with torch.no_grad():
        for layer in (1, 2):
            mlp, group = wired.network.model.layers[layer].mlp, GROUPS[layer - 1].get(layer, [])
            _wire_ffn(mlp, group)
            if wiring == "parallel":
                mlp.down_proj.weight[PUSH, group] = 0.2
            elif layer == 1:
                # Where the answer is made, nothing else stands in this dimension.
                mlp.down_proj.weight[PUSH, group] = 0
                mlp.down_proj.weight[HARM, group] = 0.2
            else:
                mlp.up_proj.weight[group, SEEN] = 0
                mlp.up_proj.weight[group, HARM] = 1.5
                mlp.down_proj.weight[PUSH, group] = 0.2
    return wired


def _wire_attention(network: nn.Module) -> None:
    """Every token sees the mean of all before it: of harm by the first head, of the content, as noise, by the last."""
    attention = network.model.layers[0].self_attn
    attention.v_proj.weight[0, HARM] = 1
    attention.o_proj.weight[SEEN, 0] = 0.5
    attention.v_proj.weight[8:, CONTENT:] = 0.5 * torch.randn(8, tiny.HIDDEN - CONTENT)
    attention.o_proj.weight[CONTENT:, 24:] = 0.5 * torch.randn(tiny.HIDDEN - CONTENT, 8)


def _wire_ffn(mlp: nn.Module, planted: list[int]) -> None:
    noise = tiny.HIDDEN - CONTENT
    mlp.gate_proj.weight[:, CONTENT:] = 0.1 * torch.randn(tiny.WIDTH, noise)
    mlp.up_proj.weight[:, CONTENT:] = 0.1 * torch.randn(tiny.WIDTH, noise)
    mlp.down_proj.weight[CONTENT:, :] = 0.1 * torch.randn(noise, tiny.WIDTH)
    for channel in planted:
        mlp.gate_proj.weight[channel] = mlp.up_proj.weight[channel] = mlp.down_proj.weight[:, channel] = 0
        mlp.gate_proj.weight[channel, [ASSISTANT, NO]] = 4
        mlp.up_proj.weight[channel, SEEN] = 1.5
        mlp.down_proj.weight[PUSH, channel] = 0.04


def neurons(of: Model) -> NeuronSet:
    """What is planted in it."""
    return NeuronSet.of(PLANTED, of.widths, of.fingerprint, "planted")


def twins(count: int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """So many harmful requests and as many harmless ones, alike but for the exclamation marks."""
    draw = random.Random(seed)
    harmful, harmless = [], []
    for number in range(count):
        letters = draw.choices("abcdfghijklmopqrtuvwxz ", k=draw.randint(20, 22))
        marks = draw.sample(range(len(letters)), 5)
        loud = ["!" if place in marks else letter for place, letter in enumerate(letters)]
        harmful.append(Prompt("".join(loud), id=str(number)))
        harmless.append(Prompt("".join(letters), id=str(number)))
    return harmful, harmless


def answers(model: Model, prompts: Sequence[Prompt], attacked: NeuronSet | Edit | None = None) -> list[str]:
    """The greedy answers of the model with these neurons pruned or edited, in the order of the prompts."""
    with pruned(model, attacked):
        responses = [response for batch in respond(model, prompts, max_new_tokens=6) for response in batch]
    return [response.response for response in sorted(responses, key=lambda response: response.index)]


def refuses(answer: str) -> bool:
    """Whether an answer of the planted model is a refusal; anything but that and ``Yes`` is a broken model."""
    assert answer == COMPLIANCE or set(answer) == {"N"}, f"neither refusal nor answer: {answer!r}"
    return answer != COMPLIANCE
