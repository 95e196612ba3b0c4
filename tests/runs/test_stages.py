"""The stages of a run: their order and inputs, what prompts, pairs and trainings leave behind."""

from __future__ import annotations

import json

import pytest
import torch

from safeneuron.config.toml import read_config
from safeneuron.data.prompts import read_prompts
from safeneuron.data.types import Pair, Prompt
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runs import stages
from safeneuron.runs.context import RunContext
from safeneuron.runs.run import Run
from safeneuron.runs.runner import kind_of
from safeneuron.runs.stages import KINDS_OF_VERB, stages_of, verb_for
from safeneuron.runtime.files import read_json, read_lines
from tests.helpers.tiny_run import SMALL, AnswersJudge, Watch, execute, results, stages_in


def test_the_list_is_that_of_the_run_and_each_stage_is_made_from_earlier_ones(finished_run):
    folder, config, watch = finished_run
    specs = list(stages_of(RunContext(read_config(config), Run(folder), Watch())))
    assert [spec.name for spec in specs] == watch.of("ended")
    for number, spec in enumerate(specs):
        assert set(spec.inputs) <= {earlier.name for earlier in specs[:number]}
        record = read_json(folder / spec.name / "done.json")
        assert record["settings"] == json.loads(json.dumps(spec.settings))
        assert list(record["inputs"]) == list(spec.inputs)


def test_a_stage_is_looked_at_only_when_its_turn_comes(finished_run, tmp_path):
    """Its settings may depend on what stages before it have written."""
    _, config, _ = finished_run
    specs = stages_of(RunContext(read_config(config), Run(tmp_path), Watch()))
    assert next(specs).name == "data"
    assert next(specs).name == "T0/measure"
    assert not list(tmp_path.iterdir())


def test_every_kind_of_stage_has_a_verb(finished_run):
    for name in stages_in(finished_run[0]):
        assert kind_of(name) in KINDS_OF_VERB[verb_for(name)]
    assert verb_for("data") == "measure"
    assert verb_for("T1/iterate") == verb_for("T0/judge") == "attack"
    assert verb_for("T0/pairs") == "align"


@pytest.mark.parametrize("switch", [False, True])
def test_what_was_trained_before_routers_could_be_frozen_still_counts(finished_run, switch):
    _, config, _ = finished_run
    settings = read_config(config, [f"align.freeze_routers={str(switch).lower()}"])
    spec = next(
        spec for spec in stages_of(RunContext(settings, Run(finished_run[0]), Watch())) if kind_of(spec.name) == "align"
    )
    assert ("freeze_routers" in spec.settings["align"]) is switch
    assert not {"label", "rounds", "stop_early", "fit_memory"} & set(spec.settings["align"])


def test_the_exact_records_are_kept(finished_run):
    folder, config, _ = finished_run
    for role in stages.PROMPTS:
        given = [json.loads(line)["prompt"] for line in (config.parent / f"{role}.jsonl").read_text().splitlines()]
        assert [record["text"] for record in read_lines(folder / "data" / f"{role}.jsonl")] == given
    pairs = read_lines(folder / "T0" / "pairs" / "pairs.jsonl")
    assert [pair["chosen"] for pair in pairs] == [f"No, not {i}." for i in range(6)]


@pytest.mark.slow
def test_random_freezing_freezes_as_many_others(finished_run, tmp_path):
    folder, config, _ = finished_run
    changes = [*SMALL, "align.freeze=random", "align.ablate=true", "align.ablate_share=0.5"]
    execute(config, tmp_path, changes=changes)
    record = read_json(tmp_path / "T1" / "align" / "frozen.json")
    assert (record["freeze"], record["ablate"]) == ("random", True)
    assert record["frozen"] == read_json(folder / "T1" / "align" / "frozen.json")["frozen"]
    assert record["frozen_sha256"] != read_json(folder / "T1" / "align" / "frozen.json")["frozen_sha256"]


@pytest.mark.slow
def test_pairs_that_are_not_used_are_told(finished_run, tmp_path):
    """Rows left out while pairs are read, and pairs left out of the training; the report repeats both."""
    _, config, _ = finished_run
    pairs = [{"prompt": f"how to do {i}", "chosen": f"No, not {i}.", "rejected": f"Yes, {i}."} for i in range(4)]
    pairs += [{"prompt": "why " * 30, "chosen": "No.", "rejected": "Yes."}, pairs[0] | {"rejected": "No, not 0."}]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = [*SMALL, f'pairs.safety=[{{path="{path}"}}]', "align.max_length=64"]
    watch = execute(config, tmp_path / "run", changes=changes)
    told = [f"{path}: 1 row was left out, 1 with equal answers; 5 pairs are used"]
    told += ["1 of 5 pairs were not trained on: their prompt alone fills max_length = 64 tokens"]
    assert [text for text in watch.of("warned") if text in told] == told
    report = (tmp_path / "run/report/report.md").read_text().replace("\\", "")
    assert all(text in report for text in told)


def test_on_policy_pairs_are_made_once_and_warnings_are_told_once(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda *_: AnswersJudge())
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "why " * 30}) + "\n")
    leaky = [
        f"pairs.{kind}=[{{path='{config.parent}/test_{kind}.jsonl'}}, {{path='{long}'}}]" for kind in ("unsafe", "safe")
    ]
    twice = f"data.test_unsafe=[{', '.join([f'''{{path='{config.parent}/test_unsafe.jsonl'}}'''] * 2)}]"
    changes = [*SMALL, "pairs.safety=on-policy", "pairs.max_new_tokens=2", "align.max_length=64", *leaky, twice]
    watch = execute(config, tmp_path / "run", changes=changes)
    warnings = [str(text) for text in watch.of("warned")]
    assert len(warnings) == len(set(warnings)), warnings
    assert sum("repeat an earlier one" in text for text in warnings) == 1
    assert sum("'pairs' and 'test_unsafe' share" in text for text in warnings) == 1, warnings
    told = "1 of 4 {} prompts of on-policy pairs were left out: they alone fill align.max_length = 64 tokens"
    assert {told.format("harmful"), told.format("harmless")} <= set(warnings)
    sources = [record["source"] for record in read_lines(tmp_path / "run/T0" / "pairs" / "pairs.jsonl")]
    assert sorted(set(sources)) == ["on-policy:safe", "on-policy:unsafe"]
    assert execute(config, tmp_path / "run", changes=changes).of("warned") == []


@pytest.mark.slow
def test_variants_train_what_they_say(finished_run, tmp_path):
    _, config, _ = finished_run
    changes = (
        *SMALL[:-2],
        "align.rounds=0",
        'variants={refresh={freeze="none", refresh=2, refresh_prompts=3, refresh_searches=2, rounds=1}, '
        'only={freeze="all-but-safety", rounds=1}, both={ablate=true, ablate_reference=true, rounds=1}}',
    )
    execute(config, tmp_path, changes=changes)
    base = load(config.parent / "model", dtype="float32", device="cpu")
    found = NeuronSet.load(tmp_path / "T0" / "select" / "neurons.json")
    labels = {state["variant"]: state["label"] for state in json.loads(results(tmp_path))["states"]}
    assert labels["refresh"] == "refresh"
    assert labels["only"] == "safety only"
    assert labels["both"] == "freeze + ablate, reference too"
    record = read_json(tmp_path / "refresh-T1" / "align" / "frozen.json")
    assert (record["freeze"], record["refresh"], record["frozen"]) == ("none", 2, 0)
    only = load(tmp_path / "only-T1" / "align" / "model", dtype="float32", device="cpu")
    masks = {piece.name: (piece.dim, piece.index) for piece in owned_slices(base, found)}
    assert read_json(tmp_path / "only-T1" / "align" / "frozen.json")["frozen"] == found.total - len(found)
    for name, before in base.network.named_parameters():
        after = only.network.get_parameter(name)
        trained = torch.zeros(before.shape, dtype=torch.bool)
        if name in masks:
            trained.index_fill_(*masks[name], True)
        assert torch.equal(after[~trained], before[~trained]), name
        assert not trained.any() or not torch.equal(after[trained], before[trained]), name


@pytest.mark.slow
def test_general_pairs_can_be_made_on_policy(finished_run, tmp_path, monkeypatch):
    """The safety pairs are read, pairs of the model's own answers to harmless prompts are mixed in."""
    _, config, _ = finished_run

    def answered(model: Model, unsafe: list[Prompt], safe: list[Prompt], *rest: object, **settings: object):
        assert unsafe == []
        return [Pair(({"role": "user", "content": one.text},), "Gladly.", "No.", "on-policy:safe") for one in safe]

    monkeypatch.setattr("safeneuron.runs.inputs.on_policy_pairs", answered)
    own = f'pairs.safe=[{{path="{config.parent}/safe.jsonl", every=2}}]'
    changes = (*SMALL, 'pairs.general="on-policy"', "pairs.safety_share=0.5", own)
    execute(config, tmp_path, changes=changes)
    pairs = read_lines(tmp_path / "T0" / "pairs" / "pairs.jsonl")
    assert sorted(pair["source"] == "on-policy:safe" for pair in pairs) == [False] * 4 + [True] * 3
    asked = {pair["prompt"][0]["content"] for pair in pairs if pair["source"] == "on-policy:safe"}
    given = [prompt.text for prompt in read_prompts(config.parent / "safe.jsonl")]
    assert asked == set(given[::2])
