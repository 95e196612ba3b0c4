"""How the attackers of a config find neurons on a model: the paper's, once or again and again, and her rivals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safeneuron.attacks.checkpoint import write_pruned
from safeneuron.attacks.finetuning import Demonstration, finetuned, read_demonstrations
from safeneuron.attacks.jailbreaks import Attempt, input_attempts
from safeneuron.attacks.pruning import PLAIN, perplexity, respond
from safeneuron.attacks.refusal_direction import find_direction, without_direction
from safeneuron.config.align import AlignTable
from safeneuron.config.attack import AttackTable
from safeneuron.config.attack_plan import PlannedAttack, kinds_answered
from safeneuron.config.schema import Config
from safeneuron.config.states import State
from safeneuron.data.prompts import benign_text
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.judge import Judge, RefusalPhrases
from safeneuron.models.exchanges import exchanges_of
from safeneuron.models.forward import MeasurementSettings
from safeneuron.models.model import Model
from safeneuron.models.vision_tower import pruned_anywhere
from safeneuron.models.vllm import Server, served
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.findings import PLAN, Findings
from safeneuron.runs.inputs import measurement_of, selection_of
from safeneuron.runtime import distributed
from safeneuron.runtime.files import append_lines, kept_lines, read_json, write_json
from safeneuron.selection.contrast import activation_contrast, gradient_gap, twin_difference, twins
from safeneuron.selection.linear_probe import probe
from safeneuron.selection.measurement import measure, search
from safeneuron.selection.ranking import Ranking
from safeneuron.selection.saliency import snip, wanda
from safeneuron.selection.scores import select
from safeneuron.training.ablation import Refresh
from safeneuron.training.on_policy import USABLE, refusal, whole_sentences

ANSWER_TOKENS = 32
"""Tokens of the answers that rivals read: where a refusal is decided."""


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
    choice = selection_of(config)
    return search(
        model,
        unsafe,
        safe,
        lambda stats: select(stats, choice),
        searches,
        first=first,
        settings=measurement_of(config),
    )


def refresh_of(config: Config, table: AlignTable, unsafe: Sequence[Prompt], safe: Sequence[Prompt]) -> Refresh:
    """The attacker whose finds are ablated while a model is trained; she sees a sample of the prompts."""
    seen = [sample(prompts, table.refresh_prompts, config.seed) for prompts in (unsafe, safe)]

    def find(running: Model) -> list[NeuronSet]:
        return searched(config, running, seen[0], seen[1], table.refresh_searches)

    return Refresh(find, table.refresh, table.refresh_share, table.kl_weight)


def sample(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, drawn at random; all of them if there are no more.

    Args:
        prompts: What is drawn from.
        count: How many.
        seed: Decides which.
    """
    return random.Random(seed).sample(list(prompts), min(count, len(prompts)))


class Rivals:
    """Attackers who look for as many neurons as the paper's, each in a way of her own.

    ``unsafe`` and ``safe`` are what they all see. What a rival reads as answers: to a harmful prompt a bundled refusal
    that fits it, to a harmless one what the model itself answers.
    """

    def __init__(
        self, config: Config, model: Model, neurons: NeuronSet, unsafe: Sequence[Prompt], safe: Sequence[Prompt]
    ) -> None:
        self.model = model
        self.density = len(neurons) / neurons.total
        self.settings = MeasurementSettings(max_tokens=config.measure.max_tokens)
        self.seed = config.seed
        self.all = (unsafe, safe)
        count = config.attack.selector_prompts
        self.unsafe, self.safe = (sample(prompts, count, config.seed) for prompts in self.all)
        refusals = [refusal(prompt, config.seed) for prompt in self.unsafe]
        self.refused = exchanges_of(model, self.unsafe, refusals, self.settings.max_tokens)
        answers = answered_prompts(model, self.safe, config.attack.batch_size)
        pairs = [(prompt, answer) for prompt, answer in zip(self.safe, answers, strict=True) if answer]
        self.answered = exchanges_of(
            model, [prompt for prompt, _ in pairs], [answer for _, answer in pairs], self.settings.max_tokens
        )

    def find(self, name: str, other: Callable[[], Model]) -> NeuronSet:
        """The neurons of the rival of that name; ``other`` loads the state that a contrast is with."""
        if name in ("snip", "wanda"):
            score = snip if name == "snip" else wanda
            # What matters most for harmless answers is passed over, as in the source (set difference, q = p).
            useful = score(self.model, self.answered).top_of_layers(self.density)
            return score(self.model, self.refused).top(self.density, avoid=useful).labelled(name)
        return self._ranking(name, other).top(self.density).labelled(name)

    def _ranking(self, name: str, other: Callable[[], Model]) -> Ranking:
        if name == "probe":
            return probe(self.model, self.unsafe, self.safe, self.settings, seed=self.seed)
        if name == "gradient":
            return gradient_gap(self.model, self.refused, self.answered)
        if name == "twins":
            return twin_difference(measure(self.model, *twins(*self.all), self.settings))
        if name != "contrast":
            raise ValueError(f"the selector {name!r} is unknown")
        return activation_contrast(self.model, other(), [*self.refused, *self.answered])


def answered_prompts(model: Model, prompts: Sequence[Prompt], batch_size: int) -> list[str]:
    """The model's answers to the prompts, in order, short and cut at the end of a sentence."""
    batches = respond(model, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=batch_size)
    responses = sorted((response for batch in batches for response in batch), key=lambda response: response.index)
    return [whole_sentences(response.response) for response in responses]


def demonstrations(
    config: Config, model: Model, neurons: NeuronSet, unsafe: Sequence[Prompt], judge: Callable[[], Judge]
) -> list[Demonstration]:
    """What the fine-tuning attack learns: the records of a file, or what the pruned model itself answers.

    Of the latter only answers that the judge calls answers, so there may be none.
    """
    table = config.attack
    if table.fine_tune_data:
        return read_demonstrations(table.fine_tune_data)
    prompts = sample(unsafe, table.selector_prompts, config.seed)
    with pruned_anywhere(model, neurons):
        answers = answered_prompts(model, prompts, table.batch_size)
    verdicts = distributed.from_main(lambda: judge()([prompt.text for prompt in prompts], answers))
    return [
        Demonstration(prompt.text, answer)
        for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True)
        if verdict in USABLE and answer
    ]


DIRECTION_PROMPTS = 16
"""Harmful prompts, of those on which neurons are found, by whose refusals the direction's layer is chosen."""


def answer_all(
    config: Config, findings: Findings, state: State, model: Model, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Every answer of the state that is not in ``folder`` yet, and under each attack the perplexity of plain prose.

    The plan of the attacks is written last, so that a stage that stopped before its first answer has left nothing.

    Args:
        config: All settings.
        findings: What has been found on the states.
        state: The attacked state.
        model: Its model.
        folder: Of the attack stage.
        progress: Told how many answers there are.

    Raises:
        InputError: For what the config gives and the model cannot be attacked with.
    """
    table = config.attack
    prompts = {"harmful": findings.prompts("test_unsafe"), "benign": findings.prompts("test_safe")}
    plan = findings.plan(state)
    # All sets are read before anything is answered: a file that does not fit is told of at once.
    edits = {attack.folder: findings.attacked(state, attack) for attack in plan.answered}
    kinds_of = {attack.folder: kinds_answered(attack, table) for attack in plan.answered}
    total = sum(len(prompts[kind]) for attack in plan.answered for kind in kinds_of[attack.folder])
    done = 0
    for attack in plan.answered:
        here, edit, kinds = folder / attack.folder, edits[attack.folder], kinds_of[attack.folder]
        if distributed.from_main((here / "pruned.json").exists):
            done += sum(len(prompts[kind]) for kind in kinds)
            continue
        attempt = input_attempts(attack.set)[0] if attack.knowledge == "input" else PLAIN
        with attacked_model(config, findings, state, model, attack, edit):
            with answer_batches(model, attack, edit, table) as answerer:
                for kind in kinds:
                    path = here / f"{kind}.jsonl"
                    done = answer(answerer, path, prompts[kind], table, attempt, progress, done, total)
            # An attack at the input leaves the model, and so its perplexity, as it is; the intact one comes first.
            if attack.knowledge == "input":
                record = read_json(folder / "ORI" / "pruned.json")
            else:
                record = {"neurons": count_of(edit), "perplexity": perplexity(model, benign_text())}
            # Written last: where it is, the answers are complete.
            write_json(here / "pruned.json", record)
    write_json(folder / PLAN, plan.sized({name: count_of(edit) for name, edit in edits.items()}).to_json())


def count_of(edit: NeuronSet | Edit | None) -> int:
    """How many neurons are touched."""
    neurons = edit.neurons if isinstance(edit, Edit) else edit
    return 0 if neurons is None else len(neurons)


@contextmanager
def attacked_model(
    config: Config, findings: Findings, state: State, model: Model, attack: PlannedAttack, edit: NeuronSet | Edit | None
) -> Iterator[None]:
    """Within the block the model is under the attack; the request is another matter."""
    table = config.attack
    if attack.knowledge != "model":
        with pruned_anywhere(model, edit):
            yield
    elif attack.set == "direction":
        unsafe, safe = (findings.prompts(role) for role in ("unsafe", "safe"))
        tried = sample(unsafe, DIRECTION_PROMPTS, config.seed)
        direction = find_direction(
            model, unsafe, safe, judge=RefusalPhrases(), validation=tried, max_new_tokens=ANSWER_TOKENS
        )
        with without_direction(model, direction):
            yield
    else:
        steps, rank = table.fine_tune_steps, table.fine_tune_rank
        with finetuned(model, findings.demonstrations(state), steps=steps, rank=rank, seed=config.seed):
            yield


@contextmanager
def answer_batches(
    model: Model, attack: PlannedAttack, edit: NeuronSet | Edit | None, table: AttackTable
) -> Iterator[Model | Server]:
    """Who answers under the attack: the model itself, or vLLM with a checkpoint of it that is deleted afterwards."""
    if table.backend == "transformers" or attack.knowledge == "model" or isinstance(edit, Edit):
        # What is not in the weights, no checkpoint can hold.
        yield model
        return
    if distributed.world() > 1:
        raise InputError(
            f"vLLM was asked for by {distributed.world()} processes, but it spreads a model over the GPUs itself; "
            'start one process, or use attack.backend = "transformers"'
        )
    with TemporaryDirectory(prefix="safeneuron-") as place:
        folder = Path(place) / "model"
        if edit is None:
            model.save(folder)
        else:
            write_pruned(model, edit, folder)
        with served(folder) as server:
            yield server


def answer(
    model: Model | Server,
    path: Path,
    prompts: Sequence[Prompt],
    table: AttackTable,
    attempt: Attempt,
    progress: Callable[[int, int], None],
    done: int,
    total: int,
) -> int:
    """Append the answers that are missing in a stream, whole batches at a time; the new count of all answers."""
    size = table.batch_size
    have = distributed.from_main(lambda: kept_lines(path, size, len(prompts)))
    if have < len(prompts):
        for batch in respond(
            model, prompts, max_new_tokens=table.max_new_tokens, batch_size=size, skip=have, attempt=attempt
        ):
            append_lines(path, (response.to_record() for response in batch))
            done += len(batch)
            progress(done + have, total)
    return done + have
