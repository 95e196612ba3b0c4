"""The pruning attack: answers of the model with some neurons at zero, what share of them complies, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeneuron.attacks.jailbreaks import Attempt
from safeneuron.data.images import name_of
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import Judge
from safeneuron.evaluation.rates import Rate, share_of
from safeneuron.models import vllm
from safeneuron.models.model import Model, generate
from safeneuron.models.vision_tower import pruned_anywhere
from safeneuron.models.vllm import Server
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime import distributed


@dataclass(frozen=True)
class Response:
    """One answer of an attacked model; ``index`` is the prompt's place in the list of prompts.

    ``image`` is the name of the prompt's picture, if it has one.
    """

    index: int
    prompt: str
    response: str
    image: str = ""

    def to_record(self) -> dict[str, int | str]:
        """As a JSON line, in which only prompts with an image have one."""
        record: dict[str, int | str] = {"index": self.index, "prompt": self.prompt, "response": self.response}
        return record | {"image": self.image} if self.image else record


@dataclass(frozen=True)
class Attack:
    """Answers and verdicts in the order of the prompts, and the attack success rate with its interval."""

    responses: list[Response]
    verdicts: list[str]
    success: Rate


PLAIN = Attempt("ORI")
"""Asking, and nothing else."""


def respond(
    model: Model | Server,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    skip: int = 0,
    attempt: Attempt = PLAIN,
) -> Iterator[list[Response]]:
    """Greedy answers of the model as it stands, batch by batch.

    A response always names the original prompt, which is what it is judged against. Of a model, all ranks get all
    answers, and each generates its share of the batches; a checkpoint that is ``served`` by vLLM answers alone.

    Args:
        model: The model, or a server with a checkpoint of it.
        prompts: What it is asked.
        max_new_tokens: Where an answer is cut off, in tokens.
        batch_size: Prompts at a time.
        skip: How many batches are finished already and left out.
        attempt: How it is asked: the responses begin with its opening. Its block is the caller's to enter.

    Returns:
        The responses of each batch. Batches are sorted by length; a response's ``index`` says whose it is.
    """
    pictures = [prompt.image for prompt in prompts]
    encoded, opening = attempt.encode(model, [prompt.written for prompt in prompts], pictures)
    if isinstance(model, Server):
        batches = vllm.server_generate(model, encoded, max_new_tokens, batch_size, skip=skip, opening=opening)
    else:
        batches = generate(model, encoded, max_new_tokens, batch_size, skip=skip, opening=opening)
    for batch in batches:
        names = {index: "" if pictures[index] is None else name_of(pictures[index]) for index, _ in batch}
        yield [Response(index, prompts[index].text, text, names[index]) for index, text in batch]


def attack(
    model: Model,
    neurons: NeuronSet | Edit | None,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    attempt: Attempt = PLAIN,
) -> Attack:
    """Prune neurons (or nothing), answer harmful prompts greedily, judge the answers, and count successes.

    Of several ranks each answers its share; the first one judges, and all get the result.

    Args:
        model: The model, which is bit-identical afterwards.
        neurons: A set of the text decoder or of a vision tower, which is pruned; an ``Edit``, which does something else
            to its neurons; or None.
        prompts: The harmful prompts.
        judge: Gives the verdicts.
        max_new_tokens: Where an answer is cut off, in tokens.
        batch_size: Prompts at a time.
        attempt: Made on top of the pruning: within its block, whose model is pruned, and with its way to ask.

    Raises:
        InputError: For a set of another model.
    """
    with attempt.block(model), pruned_anywhere(model, neurons):
        batches = respond(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, attempt=attempt)
        responses = [response for batch in batches for response in batch]
    responses.sort(key=lambda response: response.index)
    requests, answers = [response.prompt for response in responses], [response.response for response in responses]
    verdicts = distributed.from_main(lambda: judge(requests, answers))
    return Attack(responses, verdicts, share_of("complied", verdicts))


def perplexity(model: Model, text: str, *, window: int = 512) -> float:
    """Perplexity of a text under the model as it stands, in windows that do not see each other.

    A model that is broken so far that its perplexity overflows, or is not a number, gets e**700: large, but finite.

    Args:
        model: The model.
        text: A text of at least two tokens.
        window: The tokens of a window.

    Raises:
        InputError: For a shorter text.
    """
    ids = torch.tensor(list(model.tokenizer(text)["input_ids"]), device=model.device)
    if len(ids) < 2:
        raise InputError(f"perplexity needs a text of at least two tokens, found {text[:60]!r}; give a longer text")

    def loss_of(piece: Tensor) -> float:
        with torch.inference_mode():
            logits = model.network(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))

    pieces = [ids[start : start + window + 1] for start in range(0, len(ids) - 1, window)]
    mean = sum(distributed.deal(pieces, loss_of)) / (len(ids) - 1)
    return math.exp(mean if mean < 700 else 700)
