"""How refusal gives way on a real state: find-prune-find, the curve of pruning; every answer counted once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeneuron.attacking import outcome, respond, wilson
from safeneuron.config import Config
from safeneuron.data import Prompt
from safeneuron.ffn import pruned
from safeneuron.inspecting import SHARES, Classes, Effort, finder
from safeneuron.judges import Judge
from safeneuron.measuring import measure
from safeneuron.models import Model
from safeneuron.neurons import NeuronSet
from safeneuron.redundancy import Found, Outcome, Redundancy, find_prune_find, intervals
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
        if not path.exists() or "verdicts" not in read_json(path):
            with pruned(model, gone):
                batches = respond(model, asked, config.attack.max_new_tokens, config.attack.batch_size)
                answers = sorted((one for batch in batches for one in batch), key=lambda one: one.index)
            verdicts = judge([one.prompt for one in answers], [one.response for one in answers])
            counts = {**outcome(verdicts, "refused"), "neurons": 0 if gone is None else len(gone)}
            write_json(path, {**counts, "verdicts": verdicts})
        told()
        return Outcome(tuple(read_json(path)["verdicts"]))

    def search(gone: NeuronSet | None) -> NeuronSet:
        with pruned(model, gone):
            return find(measure(model, *classes, table.pooling, table.batch_tokens, table.max_tokens))

    result = _resumed(search, answered, folder, effort.sets)
    curve: list[tuple[int, Outcome]] = []
    if result.measurable:
        density = len(result.sets[0].neurons) / scores.d.numel() if result.sets else 0.01
        for wanted in (min(density * share, 0.5) for share in SHARES):
            neurons = choose(scores, thresholds_for(scores, wanted)).union
            curve.append((len(neurons), answered(neurons, f"density-{wanted:.4g}")))
    result = replace(result, curve=tuple(curve))
    found = intervals(result, seed=config.seed)
    return {
        "prompts": len(asked),
        "intact": _shares(result.intact),
        **result.numbers,
        "intervals": None if found is None else {name: one._asdict() for name, one in found.items()},
        "sets": [
            {"neurons": len(one.neurons), "alone": _shares(one.alone), "together": _shares(one.together)}
            for one in result.sets
        ],
        "curve": [{"neurons": count, **_shares(one)} for count, one in [(0, result.intact), *curve]],
    }


def _shares(found: Outcome) -> dict[str, float]:
    """The shares, and the 95 % Wilson interval of that refused."""
    refused = wilson(found.verdicts.count("refused"), len(found.verdicts))
    shares = {"refused": found.refused, "complied": found.complied, "incoherent": found.incoherent}
    return {**shares, "refused_low": refused.low, "refused_high": refused.high}


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
