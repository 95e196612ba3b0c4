"""A state under all its attacks: the answers, stream by stream, so that interrupted work goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safeneuron import ranks
from safeneuron.attacking import PLAIN, perplexity, respond
from safeneuron.attempts import Attempt, input_attempts
from safeneuron.config import AttackTable, Config
from safeneuron.data import Prompt, benign_text
from safeneuron.directions import find_direction, without_direction
from safeneuron.edits import Edit
from safeneuron.errors import InputError
from safeneuron.finding import ANSWER_TOKENS, sample
from safeneuron.finetuning import Demonstration, finetuned
from safeneuron.judges import RefusalPhrases
from safeneuron.models import Model
from safeneuron.persisting import write_pruned
from safeneuron.runs import append_lines, kept_lines, read_json, write_json
from safeneuron.serving import Server, served
from safeneuron.states import Findings, Pruning, State
from safeneuron.towers import pruned_anywhere

DIRECTION_PROMPTS = 16
"""Harmful prompts, of those on which neurons are found, by whose refusals the direction's layer is chosen."""

BASIC = ("none", "static", "adaptive", "iterated", "control")
"""The attacks under which harmless requests are answered too, if they are under any."""


def answer_all(
    config: Config, findings: Findings, state: State, model: Model, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Every answer of the state that is not in ``folder`` yet, and under each attack the perplexity of plain prose."""
    table = config.attack
    prompts = {"harmful": findings.prompts("test_unsafe"), "benign": findings.prompts("test_safe")}
    plan = [(pruning, asked(pruning, table)) for pruning in findings.prunings(state)]
    total = sum(len(prompts[kind]) for _, kinds in plan for kind in kinds)
    done = 0
    for pruning, kinds in plan:
        here = folder / pruning.folder
        if ranks.from_main((here / "pruned.json").exists):
            done += sum(len(prompts[kind]) for kind in kinds)
            continue
        attempt = input_attempts(pruning.set)[0] if pruning.knowledge == "input" else PLAIN
        with under(config, findings, state, model, pruning):
            with answering(model, pruning, table) as answerer:
                for kind in kinds:
                    path = here / f"{kind}.jsonl"
                    done = answer(answerer, path, prompts[kind], table, attempt, progress, done, total)
            # An attack at the input leaves the model, and so its perplexity, as it is; the intact one comes first.
            if pruning.knowledge == "input":
                record = read_json(folder / "ORI" / "pruned.json")
            else:
                record = {"neurons": count_of(pruning), "perplexity": perplexity(model, benign_text())}
            # Written last: where it is, the answers are complete.
            write_json(here / "pruned.json", record)


def asked(pruning: Pruning, table: AttackTable) -> list[str]:
    """Which requests are answered under an attack."""
    benign = table.over_refusal == "always" or (table.over_refusal == "unpruned" and pruning.neurons is None)
    return ["harmful", "benign"] if benign and pruning.knowledge in BASIC else ["harmful"]


def count_of(pruning: Pruning) -> int:
    """How many neurons are touched."""
    touched = pruning.neurons.neurons if isinstance(pruning.neurons, Edit) else pruning.neurons
    return 0 if touched is None else len(touched)


@contextmanager
def under(config: Config, findings: Findings, state: State, model: Model, pruning: Pruning) -> Iterator[None]:
    """Within the block the model is under the attack; the request is another matter."""
    table = config.attack
    if pruning.knowledge != "model":
        with pruned_anywhere(model, pruning.neurons):
            yield
    elif pruning.set == "direction":
        unsafe, safe = (findings.prompts(role) for role in ("unsafe", "safe"))
        tried = sample(unsafe, DIRECTION_PROMPTS, config.seed)
        direction = find_direction(model, unsafe, safe, RefusalPhrases(), tried, max_new_tokens=ANSWER_TOKENS)
        with without_direction(model, direction):
            yield
    else:
        learnt = [Demonstration(record["request"], record["answer"]) for record in findings.demonstrations(state)]
        with finetuned(model, learnt, table.fine_tune_steps, table.fine_tune_rank, seed=config.seed):
            yield


@contextmanager
def answering(model: Model, pruning: Pruning, table: AttackTable) -> Iterator[Model | Server]:
    """Who answers under the attack: the model itself, or vLLM with a checkpoint of it that is deleted afterwards."""
    in_weights = pruning.knowledge != "model" and not isinstance(pruning.neurons, Edit)
    if table.backend == "transformers" or not in_weights:
        yield model
        return
    if ranks.world() > 1:
        raise InputError(
            f"vLLM was asked for by {ranks.world()} processes, but it spreads a model over the GPUs itself; start one "
            'process, or use attack.backend = "transformers"'
        )
    with TemporaryDirectory(prefix="safeneuron-") as place:
        folder = Path(place) / "model"
        if pruning.neurons is None:
            model.save(folder)
        else:
            write_pruned(model, pruning.neurons, folder)
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
    have = ranks.from_main(lambda: kept_lines(path, size, len(prompts)))
    if have < len(prompts):
        for batch in respond(model, prompts, table.max_new_tokens, size, skip=have, attempt=attempt):
            append_lines(path, (response.to_record() for response in batch))
            done += len(batch)
            progress(done + have, total)
    return done + have
