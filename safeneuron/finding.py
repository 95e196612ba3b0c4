"""How the attackers of a config find neurons on a model: the paper's, once or again and again, and her rivals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from safeneuron import ranks
from safeneuron.ablating import Refresh
from safeneuron.attacking import respond
from safeneuron.config import AlignTable, Config
from safeneuron.contrasting import activation_contrast, gradient_gap, twin_difference, twins
from safeneuron.data import Prompt
from safeneuron.finetuning import Demonstration, read_demonstrations
from safeneuron.judges import Judge
from safeneuron.measuring import measure, search
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.pairing import USABLE, refusal, whole_sentences
from safeneuron.probing import probe
from safeneuron.rankings import Ranking
from safeneuron.saliency import snip, wanda
from safeneuron.selecting import select
from safeneuron.streaming import exchanges_of
from safeneuron.towers import pruned_anywhere

ANSWER_TOKENS = 32
"""Tokens of the answers that rivals read: where a refusal is decided."""

Progress = Callable[[int, int], None]


def require_given(config: Config) -> None:
    """Read the neurons and demonstrations that an attack is given in files, so that a mistake is told before all work.

    Raises ``InputError`` for a file that is missing or is not what it should be.
    """
    table = config.attack
    if table.transfer:
        NeuronSet.load(table.transfer)
    if table.fine_tune_data and "fine-tune" in table.attempts:
        read_demonstrations(table.fine_tune_data)


def settings_of(config: Config) -> dict[str, object]:
    """The settings that decide which neurons are found on a model."""
    return {
        "measure": config.measure.settings(),
        "select": config.select.model_dump(),
        "model": config.model.settings(),
    }


def searched(
    config: Config,
    model: Model,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    searches: int,
    first: NeuronSet | None = None,
) -> list[NeuronSet]:
    """What an attacker with this config finds on the model in so many searches, each set holding the one before."""
    table, choice = config.measure, config.select
    return search(
        model,
        unsafe,
        safe,
        lambda stats: select(stats, choice.effect_size, choice.shift, choice.density),
        searches,
        first=first,
        pooling=table.pooling,
        batch_tokens=table.batch_tokens,
        max_tokens=table.max_tokens,
    )


def refresh_of(config: Config, table: AlignTable, unsafe: Sequence[Prompt], safe: Sequence[Prompt]) -> Refresh:
    """The attacker whose finds are ablated while a model is trained; she sees a sample of the prompts."""
    seen = [sample(prompts, table.refresh_prompts, config.seed) for prompts in (unsafe, safe)]

    def find(running: Model) -> list[NeuronSet]:
        return searched(config, running, seen[0], seen[1], table.refresh_searches)

    return Refresh(find, table.refresh, table.refresh_share, table.kl_weight)


def sample(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, drawn at random; all of them if there are no more."""
    return random.Random(seed).sample(list(prompts), min(count, len(prompts)))


class Rivals:
    """Attackers who look for as many neurons as the paper's, ``own``, each in a way of her own.

    ``unsafe`` and ``safe`` are what they all see. What a rival reads as answers: to a harmful prompt a bundled refusal
    that fits it, to a harmless one what the model itself answers.
    """

    def __init__(
        self, config: Config, model: Model, own: NeuronSet, unsafe: Sequence[Prompt], safe: Sequence[Prompt]
    ) -> None:
        self.model = model
        self.own = own
        self.tokens = config.measure.max_tokens
        self.seed = config.seed
        self.all = (unsafe, safe)
        count = config.attack.selector_prompts
        self.unsafe, self.safe = (sample(prompts, count, config.seed) for prompts in self.all)
        refusals = [refusal(prompt, config.seed) for prompt in self.unsafe]
        self.refused = exchanges_of(model, self.unsafe, refusals, self.tokens)
        answers = answered(model, self.safe, config.attack.batch_size)
        kept = [(prompt, answers[index]) for index, prompt in enumerate(self.safe) if answers[index]]
        self.answered = exchanges_of(model, [prompt for prompt, _ in kept], [answer for _, answer in kept], self.tokens)

    def find(self, name: str, other: Callable[[], Model]) -> NeuronSet:
        """The neurons of the rival of that name; ``other`` loads the state that a contrast is with."""
        density = len(self.own) / self.own.total
        if name in ("snip", "wanda"):
            score = snip if name == "snip" else wanda
            # What matters most for harmless answers is passed over, as in the source (set difference, q = p).
            useful = score(self.model, self.answered).top_of_layers(density)
            return score(self.model, self.refused).top(density, avoid=useful).labelled(name)
        return self._ranking(name, other).top(density).labelled(name)

    def _ranking(self, name: str, other: Callable[[], Model]) -> Ranking:
        if name == "probe":
            return probe(self.model, self.unsafe, self.safe, max_tokens=self.tokens, seed=self.seed)
        if name == "gradient":
            return gradient_gap(self.model, self.refused, self.answered)
        if name == "twins":
            return twin_difference(measure(self.model, *twins(*self.all), max_tokens=self.tokens))
        assert name == "contrast", "the config knows no other"
        return activation_contrast(self.model, other(), [*self.refused, *self.answered])


def answered(model: Model, prompts: Sequence[Prompt], batch_size: int) -> list[str]:
    """The model's answers to the prompts, in order, short and cut at the end of a sentence."""
    found = [response for batch in respond(model, prompts, ANSWER_TOKENS, batch_size) for response in batch]
    return [whole_sentences(one.response) for one in sorted(found, key=lambda one: one.index)]


def demonstrations(
    config: Config, model: Model, own: NeuronSet, unsafe: Sequence[Prompt], judge: Callable[[], Judge]
) -> list[Demonstration]:
    """What the fine-tuning attack learns: the records of a file, or what the pruned model itself answers.

    Of the latter only answers that the judge calls answers, so there may be none.
    """
    table = config.attack
    if table.fine_tune_data:
        return read_demonstrations(table.fine_tune_data)
    prompts = sample(unsafe, table.selector_prompts, config.seed)
    with pruned_anywhere(model, own):
        answers = answered(model, prompts, table.batch_size)
    verdicts = ranks.from_main(lambda: judge()([prompt.text for prompt in prompts], answers))
    return [
        Demonstration(prompt.text, answer)
        for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True)
        if verdict in USABLE and answer
    ]
