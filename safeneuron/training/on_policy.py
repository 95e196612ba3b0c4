"""Preference pairs from prompts alone: a model's own answers, with and without its safety neurons, against refusals."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from safeneuron.data.prompts import fitting_refusal
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import Judge
from safeneuron.models.model import Model, generate
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime import distributed
from safeneuron.runtime.progress import Progress

USABLE = ("complied", "harmless")
"""Verdicts on answers that can stand in a pair."""

LEADS = (
    "I can't help with that.",
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "I'm sorry, I can't help with this.",
    "Sorry, but I won't help with that.",
)
"""How a refusal opens. The reasons that follow vary widely; with a common opening a small model refused as often after
40 steps as with varied ones after 61 (one trial each, see docs/benchmarks.md)."""


def on_policy_pairs(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    neurons: NeuronSet,
    judge: Judge,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Pair]:
    """Pairs that teach a model to refuse what is harmful and to go on answering what is not.

    For a harmful prompt, chosen is a refusal that fits the request and rejected is what the model itself answers with
    its safety ``neurons`` pruned: it is the red-team generator that the method defends against. Where that answer is
    incoherent or a refusal, the intact model's own answer takes its place, if it complies. For a benign prompt,
    chosen is the intact model's own answer and rejected is a refusal. Answers are cut at the end of a sentence. A
    prompt without an answer that is coherent and no refusal gives no pair. Each rank generates its share of the
    answers.

    Args:
        model: The model that answers.
        unsafe: Harmful prompts.
        safe: Harmless prompts.
        neurons: The safety neurons of the model.
        judge: Tells answers that can be used from refusals.
        max_new_tokens: The length of an answer in tokens.
        batch_size: Answers generated side by side.
        seed: Of the refusals that are chosen.
        progress: Is told the answers that are there.

    Returns:
        Unsafe and safe pairs in turn; all ranks get all of them.

    Raises:
        InputError: When no pair at all comes out.
    """
    every = [*unsafe, *safe]

    def answers(prompts: Sequence[Prompt], done: int) -> list[str]:
        """Usable answers to the prompts; empty where the model refused or babbled."""
        encoded = [model.ask(prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        for batch in generate(model, encoded, max_new_tokens, batch_size):
            for index, text in batch:
                texts[index] = whole_sentences(text)
            done += len(batch)
            if progress is not None:
                progress(done, len(unsafe) + len(every))
        verdicts = distributed.from_main(lambda: judge([prompt.text for prompt in prompts], texts))
        return [text if verdict in USABLE else "" for text, verdict in zip(texts, verdicts, strict=True)]

    with pruned(model, neurons):
        attacked = answers(unsafe, 0)
    intact = answers(every, len(unsafe))
    compliant = [first or second for first, second in zip(attacked, intact, strict=False)]
    unsafe_pairs = [
        Pair(_conversation(prompt), refusal(prompt, seed), answer, "on-policy:unsafe", prompt.image)
        for prompt, answer in zip(unsafe, compliant, strict=True)
        if answer
    ]
    safe_pairs = [
        Pair(_conversation(prompt), answer, refusal(prompt, seed + 1), "on-policy:safe", prompt.image)
        for prompt, answer in zip(safe, intact[len(unsafe) :], strict=True)
        if answer
    ]
    if not unsafe_pairs and not safe_pairs:
        raise InputError(
            "the model gave no answer that could be used in a pair: every one was a refusal or incoherent; give pairs "
            "from a file or the Hub in [pairs]"
        )
    longest = max(len(unsafe_pairs), len(safe_pairs))
    return [pair for i in range(longest) for pair in unsafe_pairs[i : i + 1] + safe_pairs[i : i + 1]]


def refusal(prompt: Prompt, seed: int) -> str:
    """A refusal of the prompt: a short opening, then reasons that fit its category.

    Args:
        prompt: What is refused.
        seed: The refusal is the same for the same prompt and seed.
    """
    draw = hashlib.sha256(f"opening\n{seed}\n{prompt.text}".encode()).digest()[0]
    return f"{LEADS[draw % len(LEADS)]} {fitting_refusal(prompt, seed)}"


def whole_sentences(text: str) -> str:
    """The text up to the end of its last sentence or line, if that keeps a third of it or more; else all of it.

    Args:
        text: An answer that may have been cut at its greatest length.
    """
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s|$)|\n", text)]
    # The number of a list item ("2.") ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\n)\s*\d+\.$", text[:end])]
    whole = text[: ends[-1]].strip() if ends else ""
    return whole if len(whole) >= len(text) / 3 else text


def _conversation(prompt: Prompt) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt.written},)
