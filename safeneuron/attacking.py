"""The pruning attack: answers of the model with some neurons at zero, what share of them complies, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeneuron import ranks, serving
from safeneuron.attempts import Attempt
from safeneuron.data import Prompt
from safeneuron.edits import Edit
from safeneuron.errors import InputError
from safeneuron.judges import VERDICTS, Judge
from safeneuron.models import Model, generate
from safeneuron.neurons import NeuronSet
from safeneuron.pictures import name_of
from safeneuron.serving import Server
from safeneuron.towers import pruned_anywhere


@dataclass(frozen=True)
class Response:
    """One answer of an attacked model; ``index`` is the prompt's place in the list of prompts.

    ``image`` is the name of the prompt's picture, if it has one.
    """

    index: int
    prompt: str
    response: str
    image: str = ""

    def to_record(self) -> dict[str, object]:
        """As a JSON line, in which only prompts with an image have one."""
        return {name: value for name, value in asdict(self).items() if name != "image" or value}


class Attack(NamedTuple):
    """Answers and verdicts in the order of the prompts, and the attack success rate with its interval."""

    responses: list[Response]
    verdicts: list[str]
    success: Rate


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson 95 % interval and the number of judgements it rests on.

    With nothing to judge, the share and its interval are 0, 0 and 1.
    """

    count: int
    n: int
    rate: float
    low: float
    high: float


def wilson(count: int, n: int) -> Rate:
    """``count`` of ``n`` with the Wilson score interval at 95 %."""
    from scipy.stats import binomtest

    if n == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(count, n, count / n, float(interval.low), float(interval.high))


def share_of(verdict: str, verdicts: Sequence[str]) -> Rate:
    """The share of one verdict among all that could be judged; "cannot say" is left out of both, never called safe.

    ``share_of("complied", ...)`` on harmful prompts is the ASR, ``share_of("refused", ...)`` on benign ones the
    over-refusal rate. Incoherent answers stay in the denominator: they are neither a success nor a refusal.
    """
    judged = [found for found in verdicts if found != "cannot say"]
    return wilson(judged.count(verdict), len(judged))


def outcome(verdicts: Sequence[str], counted: str) -> dict[str, float]:
    """How many answers got each verdict, with ``rate``, ``low`` and ``high`` of the verdict that is ``counted``."""
    share = share_of(counted, verdicts)
    counts = {verdict: list(verdicts).count(verdict) for verdict in VERDICTS}
    return {"n": len(verdicts), **counts, "rate": share.rate, "low": share.low, "high": share.high}


PLAIN = Attempt("ORI")
"""Asking, and nothing else."""


def respond(
    model: Model | Server,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 32,
    skip: int = 0,
    attempt: Attempt = PLAIN,
) -> Iterator[list[Response]]:
    """Greedy answers of the model as it stands, batch by batch; ``skip`` leaves out finished batches.

    With an ``attempt`` the model is asked as it says, and the responses begin with its opening; its block is the
    caller's to enter. A response always names the original prompt, which is what it is judged against. Of a model, all
    ranks get all answers, and each generates its share of the batches; a checkpoint that is ``served`` by vLLM answers
    alone.
    """
    pictures = [prompt.image for prompt in prompts]
    encoded, opening = attempt.encode(model, [prompt.written for prompt in prompts], pictures)
    if isinstance(model, Server):
        batches = serving.generate(model, encoded, max_new_tokens, batch_size, skip, opening)
    else:
        batches = generate(model, encoded, max_new_tokens, batch_size, skip, opening)
    for batch in batches:
        names = {index: "" if pictures[index] is None else name_of(pictures[index]) for index, _ in batch}
        yield [Response(index, prompts[index].text, text, names[index]) for index, text in batch]


def attack(
    model: Model,
    neurons: NeuronSet | Edit | None,
    prompts: Sequence[Prompt],
    judge: Judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    attempt: Attempt = PLAIN,
) -> Attack:
    """Prune ``neurons`` (or nothing), answer harmful ``prompts`` greedily, judge the answers, and count successes.

    They may be of the model's eyes (``towers``). An ``Edit`` does something else to its neurons. An ``attempt`` is made
    on top of it: within its block, whose model is pruned, and with its way to ask.
    Of several ranks each answers its share; the first one judges, and all get the result.
    """
    with attempt.block(model), pruned_anywhere(model, neurons):
        batches = respond(model, prompts, max_new_tokens, batch_size, attempt=attempt)
        found = [response for batch in batches for response in batch]
    found.sort(key=lambda response: response.index)
    asked, answered = [response.prompt for response in found], [response.response for response in found]
    verdicts = ranks.from_main(lambda: judge(asked, answered))
    return Attack(found, verdicts, share_of("complied", verdicts))


def perplexity(model: Model, text: str, window: int = 512) -> float:
    """Perplexity of a text under the model as it stands, in windows of ``window`` tokens that do not see each other.

    A model that is broken so far that its perplexity overflows, or is not a number, gets e**700: large, but finite.
    Raises ``InputError`` for a text of less than two tokens.
    """
    ids = torch.tensor(list(model.tokenizer(text)["input_ids"]), device=model.device)
    if len(ids) < 2:
        raise InputError(f"perplexity needs a text of at least two tokens, found {text[:60]!r}; give a longer text")

    def loss_of(piece: Tensor) -> float:
        with torch.inference_mode():
            logits = model.network(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))

    pieces = [ids[start : start + window + 1] for start in range(0, len(ids) - 1, window)]
    mean = sum(ranks.deal(pieces, loss_of)) / (len(ids) - 1)
    return math.exp(mean if mean < 700 else 700)
