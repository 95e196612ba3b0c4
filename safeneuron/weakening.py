"""How refusal gives way on a real state: find-prune-find, the curve of pruning; every answer counted once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeneuron.attacking import outcome, respond
from safeneuron.config import Config
from safeneuron.data import Prompt
from safeneuron.ffn import pruned
from safeneuron.inspecting import SHARES, Classes, Effort, finder
from safeneuron.judges import Judge
from safeneuron.measuring import measure
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.redundancy import Found, Outcome, Redundancy, find_prune_find, neurons_to_halve
from safeneuron.runs import read_json, write_json
from safeneuron.selecting import Scores, choose, thresholds_for
from safeneuron.streaming import Progress


def redundancy_record(
    config: Config,
    model: Model,
    classes: Classes,
    asked: Sequence[Prompt],
    judge: Judge,
    scores: Scores,
    folder: Path,
    effort: Effort,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find, prune, find again, and the curve of pruning; every answer counted is kept in ``folder``, to go on from."""
    table, find = config.measure, finder(config)
    done, total = 0, 1 + 2 * effort.sets - 1 + len(SHARES)

    def told() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def answered(gone: NeuronSet | None, name: str) -> Outcome:
        path = folder / f"{name}.json"
        if not path.exists():
            with pruned(model, gone):
                batches = respond(model, asked, config.attack.max_new_tokens, config.attack.batch_size)
                answers = sorted((one for batch in batches for one in batch), key=lambda one: one.index)
            found = outcome(judge([one.prompt for one in answers], [one.response for one in answers]), "refused")
            write_json(path, {**found, "neurons": 0 if gone is None else len(gone)})
        told()
        record = read_json(path)
        return Outcome(*(record[name] / record["n"] for name in ("refused", "complied", "incoherent")))

    def search(gone: NeuronSet | None) -> NeuronSet:
        with pruned(model, gone):
            return find(measure(model, *classes, table.pooling, table.batch_tokens, table.max_tokens))

    result = _resumed(search, answered, folder, effort.sets)
    curve = [(0, result.intact)]
    if result.measurable:
        density = len(result.sets[0].neurons) / scores.d.numel() if result.sets else 0.01
        for wanted in (min(density * share, 0.5) for share in SHARES):
            neurons = choose(scores, thresholds_for(scores, wanted)).union
            curve.append((len(neurons), answered(neurons, f"density-{wanted:.4g}")))
    return {
        "prompts": len(asked),
        "intact": asdict(result.intact),
        "redundancy_index": result.index,
        "coherent_index": result.coherent_index,
        "sets_to_halve": result.sets_to_halve,
        "neurons_in_sets_to_halve": result.neurons_in_sets_to_halve,
        "neurons_to_halve": neurons_to_halve([(count, one.refused) for count, one in curve]),
        "sets": [
            {"neurons": len(one.neurons), "alone": asdict(one.alone), "together": asdict(one.together)}
            for one in result.sets
        ],
        "curve": [{"neurons": count, **asdict(one)} for count, one in curve],
    }


def _resumed(
    find: Callable[[NeuronSet | None], NeuronSet],
    answered: Callable[[NeuronSet | None, str], Outcome],
    folder: Path,
    most: int,
) -> Redundancy:
    """Find-prune-find that goes on after the sets that the folder holds."""
    intact, known = answered(None, "intact"), list[Found]()

    def named(gone: NeuronSet | None) -> Outcome:
        assert gone is not None, "the intact model is known"
        number = len(known) + 1
        alone = not (folder / f"set-{number}.json").exists()
        if alone:
            gone.save(folder / f"set-{number}.json")
        return answered(gone, f"{'alone' if alone else 'together'}-{number}")

    while (path := folder / f"set-{len(known) + 1}.json").exists() and len(known) < most:
        number, neurons = len(known) + 1, NeuronSet.load(path)
        alone = answered(neurons, f"alone-{number}")
        gone = neurons
        for one in known:
            gone = gone | one.neurons
        known.append(Found(neurons, alone, answered(gone, f"together-{number}") if known else alone))
    return find_prune_find(find, named, most, known.append, tuple(known), intact)
