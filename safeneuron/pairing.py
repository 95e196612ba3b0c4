"""Preference pairs from prompts alone: the model's own answers, with and without its safety neurons, against refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from safeneuron.data import Pair, Prompt, fitting_refusal
from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.judges import Judge
from safeneuron.models import Model, generate
from safeneuron.neurons import NeuronSet

Progress = Callable[[int, int], None]


def on_policy_pairs(
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    neurons: NeuronSet,
    judge: Judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Pair]:
    """Pairs that teach a model to refuse what is harmful and to go on answering what is not.

    For a harmful prompt, chosen is a refusal that fits the request and rejected is what the model itself answers with
    its safety ``neurons`` pruned: it is the red-team generator that the method defends against. For a benign prompt,
    chosen is the intact model's own answer and rejected is a refusal. Answers are cut at the end of a sentence. A prompt
    whose answer is incoherent, or refuses, gives no pair. The result has unsafe and safe pairs in turn.

    Raises ``InputError`` when no pair at all comes out.
    """
    total = len(unsafe) + len(safe)

    def answers(prompts: Sequence[Prompt], done: int) -> list[str]:
        encoded = [model.encode(_conversation(prompt)) for prompt in prompts]
        texts = [""] * len(prompts)
        for batch in generate(model, encoded, max_new_tokens, batch_size):
            for index, text in batch:
                texts[index] = whole_sentences(text)
            done += len(batch)
            if progress is not None:
                progress(done, total)
        return texts

    with pruned(model, neurons):
        compliant = answers(unsafe, 0)
    helpful = answers(safe, len(unsafe))
    unsafe_pairs = [
        Pair(_conversation(prompt), fitting_refusal(prompt, seed), answer, "on-policy:unsafe")
        for prompt, answer in _answered(unsafe, compliant, judge)
    ]
    safe_pairs = [
        Pair(_conversation(prompt), answer, fitting_refusal(prompt, seed + 1), "on-policy:safe")
        for prompt, answer in _answered(safe, helpful, judge)
    ]
    if not unsafe_pairs and not safe_pairs:
        raise InputError(
            "the model gave no answer that could be used in a pair: every one was a refusal or incoherent; give pairs "
            "from a file or the Hub in [pairs]"
        )
    longest = max(len(unsafe_pairs), len(safe_pairs))
    return [pair for i in range(longest) for pair in unsafe_pairs[i : i + 1] + safe_pairs[i : i + 1]]


def whole_sentences(text: str) -> str:
    """The text up to the end of its last sentence or line, if that keeps a third of it or more; else all of it."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s|$)|\n", text)]
    # The number of a list item ("2.") ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\n)\s*\d+\.$", text[:end])]
    return text[: ends[-1]].strip() if ends and ends[-1] >= len(text) / 3 else text.strip()


def _answered(prompts: Sequence[Prompt], answers: Sequence[str], judge: Judge) -> list[tuple[Prompt, str]]:
    verdicts = judge([prompt.text for prompt in prompts], answers)
    return [
        (prompt, answer)
        for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True)
        if verdict in ("complied", "harmless")
    ]


def _conversation(prompt: Prompt) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": prompt.text},)
