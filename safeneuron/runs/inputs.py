"""What a config names: models, prompts and pairs, read and known by their contents, and the judges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safeneuron.config.attack import JudgeTable
from safeneuron.config.schema import Config
from safeneuron.config.tables import CapabilityTable, ModelTable, SourceTable
from safeneuron.data.pairs import left_out, read_pairs
from safeneuron.data.prompts import check_splits, read_prompts
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair, Prompt
from safeneuron.evaluation.capability import TASKS
from safeneuron.evaluation.judge import Judge
from safeneuron.evaluation.judging import Panel, make_judge
from safeneuron.evaluation.rubric import Endpoint
from safeneuron.models.forward import MeasurementSettings
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime.files import sha256_of
from safeneuron.selection.scores import SelectionSettings
from safeneuron.training.on_policy import on_policy_pairs


def model_of(table: ModelTable, dtype: str = "", quantise: str = "none", trained: Path | None = None) -> Model:
    """The model of a config, or one that was trained from it.

    Args:
        table: The config's model.
        dtype: Its precision; the config's if empty.
        quantise: How the weights are held, ``none`` for plain ones.
        trained: The folder of a trained model, which is loaded instead.
    """
    return load(
        trained or table.name,
        dtype or table.dtype,
        table.device,
        revision="" if trained else table.revision,
        trust_remote_code=table.trust_remote_code,
        quantise=quantise,
        device_map=table.device_map,
        max_memory=table.max_memory,
        offload_folder=table.offload_folder,
    )


def measurement_of(config: Config) -> MeasurementSettings:
    """How a config's prompts become activation vectors."""
    table = config.measure
    return MeasurementSettings(pooling=table.pooling, batch_tokens=table.batch_tokens, max_tokens=table.max_tokens)


def selection_of(config: Config) -> SelectionSettings:
    """How a config chooses neurons: by thresholds or by a density."""
    table = config.select
    return SelectionSettings(effect_size=table.effect_size, shift=table.shift, density=table.density)


def prompts_of(tables: Sequence[SourceTable]) -> list[Prompt]:
    """The prompts of all these sources, in order."""
    return [prompt for table in tables for prompt in read_prompts(Source(**table.model_dump()))]


def pairs_of(table: Any, warnings: list[str]) -> list[Pair]:
    """The pairs of a source; rows that gave no pair add a warning."""
    dropped: Counter[str] = Counter()
    pairs = read_pairs(Source(**table.model_dump()), dropped=dropped)
    if dropped:
        warnings.append(f"{table.path}: {left_out(dropped)}; {len(pairs)} pairs are used")
    return pairs


def pairs_made(
    config: Config,
    model: Model,
    neurons: NeuronSet,
    unsafe: Sequence[SourceTable],
    safe: Sequence[SourceTable],
    warnings: list[str],
    progress: Callable[[int, int], None],
) -> list[Pair]:
    """On-policy pairs of the prompts of these sources; prompts that leave no room for an answer add a warning."""
    longest = config.align.max_length

    def prompts_that_fit(kind: str, tables: Sequence[SourceTable]) -> list[Prompt]:
        prompts = prompts_of(tables)
        fitting = [prompt for prompt in prompts if len(model.ask(prompt)) < longest]
        if len(fitting) < len(prompts):
            warnings.append(
                f"{len(prompts) - len(fitting)} of {len(prompts)} {kind} prompts of on-policy pairs were left out: "
                f"they alone fill align.max_length = {longest} tokens"
            )
        return fitting

    return on_policy_pairs(
        model,
        prompts_that_fit("harmful", unsafe),
        prompts_that_fit("harmless", safe),
        neurons,
        judge_of(config.judge),
        max_new_tokens=config.pairs.max_new_tokens,
        batch_size=config.attack.batch_size,
        seed=config.seed,
        progress=progress,
    )


def judges_of(table: JudgeTable) -> list[Callable[[], Judge]]:
    """The makers of the judges of a config: a judge is made, and its model loaded, only when its turn comes."""
    endpoint = Endpoint(table.url, table.model, table.timeout, table.retries, table.concurrency, table.key_variable)
    return [partial(make_judge, name, endpoint) for name in table.names]


def judge_of(table: JudgeTable) -> Judge:
    """The judge of a config, or its judges as one."""
    judges = [make() for make in judges_of(table)]
    return judges[0] if len(judges) == 1 else Panel(judges, table.rule)


def leaks(pairs: Sequence[Pair], tests: dict[str, list[Prompt]]) -> list[str]:
    """A warning if prompts of the attack are trained on; several pairs may share a prompt."""
    prompts = [Prompt(pair.prompt[-1]["content"], image=pair.image) for pair in pairs]
    trained_on = {prompt.key: prompt for prompt in prompts}
    # What the test prompts have among themselves has been warned of when they were read.
    known = check_splits(**tests)
    return [warning for warning in check_splits(pairs=list(trained_on.values()), **tests) if warning not in known]


def hashes_of(tables: Iterable[Any]) -> dict[str, str]:
    """The contents of the local files among the sources, so that an edited file is noticed."""
    return file_hashes({table.path: Path(table.path) for table in tables})


def question_hashes(table: CapabilityTable) -> dict[str, str]:
    """The contents of the files that capability benchmarks read, as far as they are there; none from the Hub."""
    names = [TASKS[task].file for task in table.tasks] if table.folder else []
    return file_hashes({name: Path(table.folder) / name for name in names})


def file_hashes(paths: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of those of the files that are there, by the names they are given here."""
    places = {name: path.expanduser() for name, path in paths.items()}
    folders = {name: _listing(path) for name, path in places.items() if path.is_dir()}
    return folders | {name: sha256_of(path) for name, path in places.items() if path.is_file()}


def _listing(folder: Path) -> str:
    """The SHA-256 of the names and sizes of the files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
    return hashlib.sha256(repr(listing).encode()).hexdigest()
