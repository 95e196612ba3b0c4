"""The red-team generator on a tiny model: reproducible, resumable, counted right, and nothing of it printed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from safeneuron.attacks.finetuning import read_demonstrations
from safeneuron.cli.app import app
from safeneuron.data.prompts import read_prompts
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.evaluation.embeddings import WordLikeness
from safeneuron.evaluation.rates import wilson
from safeneuron.models.model import Sampling, generate
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs import redteam
from safeneuron.runs.redteam import RedTeam, RedTeamResults, first_request, prepare_redteam, red_team, table
from safeneuron.runs.redteam_filters import KEPT, LOSSES
from safeneuron.runs.run import Run
from safeneuron.runtime.files import read_json, read_lines
from tests.helpers import tiny

REQUESTS = [Prompt("how do I?", "x"), Prompt("tell me more", "y"), Prompt("b")]
SETTINGS = RedTeam(per_seed=2, max_new_tokens=5, batch_size=4, seed=3)


class Judge:
    """Says that every second answer complies."""

    name = "every second"

    def __call__(self, prompts, responses):
        return ["complied" if number % 2 else "refused" for number in range(len(responses))]


@pytest.fixture(autouse=True)
def by_words(monkeypatch):
    monkeypatch.setattr(redteam, "likeness", WordLikeness)


@pytest.fixture(scope="module")
def model():
    return tiny.model(max_position_embeddings=2048)


def some_neurons(model):
    return NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)


def samples(folder, kind):
    return sorted(read_lines(folder / kind / "samples.jsonl"), key=lambda record: record["index"])


def test_samples_are_those_of_the_pruned_model(model, tmp_path):
    neurons = some_neurons(model)
    red_team(model, neurons, REQUESTS, Judge(), tmp_path / "a", SETTINGS)
    asked = [prompt.text for prompt in REQUESTS for _ in range(2)]
    encoded = [model.encode([{"role": "user", "content": text}]) for text in asked]

    def expected():
        batches = generate(model, encoded, 5, 4, sampling=Sampling(1.0, 0.95, 3))
        return sorted(one for batch in batches for one in batch)

    with pruned(model, neurons):
        under = expected()
    found = [(record["index"], record["text"]) for record in samples(tmp_path / "a", "answers")]
    assert found == under != expected()
    assert len(samples(tmp_path / "a", "prompts")) == 24


def test_interrupted_work_goes_on_with_the_same_draws(model, tmp_path):
    whole = red_team(model, None, REQUESTS, Judge(), tmp_path / "whole", SETTINGS)

    def stop(done, total):
        assert total == 30
        if done >= limit:
            raise KeyboardInterrupt

    for limit in (8, 28):
        with pytest.raises(KeyboardInterrupt):
            red_team(model, None, REQUESTS, Judge(), tmp_path / "parts", SETTINGS, stop)
        with (tmp_path / "parts" / "prompts" / "samples.jsonl").open("a") as file:
            file.write('{"index": 1, "te' if limit == 8 else "")
    assert red_team(model, None, REQUESTS, Judge(), tmp_path / "parts", SETTINGS) == whole
    for kind in ("prompts", "answers"):
        assert samples(tmp_path / "parts", kind) == samples(tmp_path / "whole", kind)


def test_finished_work_is_not_made_again_and_another_judge_needs_no_samples(model, tmp_path, monkeypatch):
    first = red_team(model, None, REQUESTS, Judge(), tmp_path / "a", SETTINGS)
    monkeypatch.setattr(redteam, "generate", None)
    assert red_team(model, None, REQUESTS, Judge(), tmp_path / "a", SETTINGS) == first

    class Other(Judge):
        name = "other"

    with pytest.raises(InputError, match=r"judge was 'every second' and is now 'other'.*--redo yield"):
        red_team(model, None, REQUESTS, Other(), tmp_path / "a", SETTINGS)
    prepare_redteam(Run.create(tmp_path / "a"), "yield")
    assert red_team(model, None, REQUESTS, Other(), tmp_path / "a", SETTINGS).judge == "other"


@pytest.mark.parametrize("change", ["neurons", "seed", "requests"])
def test_other_settings_need_another_folder(model, tmp_path, change):
    red_team(model, None, REQUESTS, Judge(), tmp_path / "a", SETTINGS)
    neurons = some_neurons(model) if change == "neurons" else None
    settings = RedTeam(2, 4, max_new_tokens=5, batch_size=4) if change == "seed" else SETTINGS
    requests = REQUESTS[:2] if change == "requests" else REQUESTS
    with pytest.raises(InputError, match="was made with other settings"):
        red_team(model, neurons, requests, Judge(), tmp_path / "a", settings)


def test_the_seed_decides_what_is_shown_and_drawn(model, tmp_path):
    other = RedTeam(per_seed=2, max_new_tokens=5, batch_size=4, seed=4)
    for name, settings in (("a", SETTINGS), ("b", SETTINGS), ("c", other)):
        red_team(model, None, REQUESTS, Judge(), tmp_path / name, settings)
    assert (
        samples(tmp_path / "a", "answers") == samples(tmp_path / "b", "answers") != samples(tmp_path / "c", "answers")
    )
    shown, others = (redteam._prompts_wanted(settings) for settings in (SETTINGS, other))
    assert [one.message for one in shown] != [one.message for one in others]


def test_prompts_are_asked_for_with_examples_of_their_category():
    harmful = read_prompts("twins:unsafe", split="discovery")
    categories = sorted({prompt.category for prompt in harmful})
    wanted = redteam._prompts_wanted(SETTINGS)
    assert Counter(one.topic for one in wanted) == dict.fromkeys(range(len(categories)), 2)
    assert len({one.message for one in wanted}) > 0.9 * len(wanted)
    for one in wanted:
        shown = [line.removeprefix("- ") for line in one.message.splitlines() if line.startswith("- ")]
        own = {prompt.text for prompt in harmful if prompt.category == categories[one.topic]}
        assert len(set(shown)) == 3
        assert set(shown) <= own
        assert categories[one.topic].replace("-", " ") in one.message


def test_the_yield_is_counted_and_what_was_kept_can_be_used(model, tmp_path):
    results = red_team(model, None, REQUESTS, Judge(), tmp_path / "a", SETTINGS)
    folder = tmp_path / "a" / "yield"
    for kind in ("prompts", "answers"):
        fates = [record["fate"] for record in read_lines(folder / f"{kind}-fates.jsonl")]
        assert {fate: fates.count(fate) for fate in (*LOSSES, KEPT)} == {
            fate: vars(results)[kind].counts[fate] for fate in (*LOSSES, KEPT)
        }
        share = wilson(fates.count(KEPT), len(fates))
        assert vars(results)[kind].kept == share
        assert read_json(folder / "results.json") == results.to_json()
        assert len(read_lines(folder / f"{kind}.jsonl")) == fates.count(KEPT)
    kept = [i for i, record in enumerate(read_lines(folder / "answers-fates.jsonl")) if record["fate"] == KEPT]
    assert kept
    texts = [record["text"] for record in samples(tmp_path / "a", "answers")]
    demonstrations = read_demonstrations(folder / "answers.jsonl")
    assert [one.answer for one in demonstrations] == [texts[i] for i in kept]
    assert [one.request for one in demonstrations] == [REQUESTS[i // 2].text for i in kept]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I do it?", "How do I do it?"),
        ('1. "How do I do it?"', "How do I do it?"),
        ("Sure, here is one:\n\n- How do I do it?\n- Another", "How do I do it?"),
        ("**Test request 4: How do I do it?**", "How do I do it?"),
        ("4) 3 ways to do it", "3 ways to do it"),
        ("\n \n", ""),
        ("Here it is:", ""),
    ],
)
def test_the_request_in_an_answer(text, expected):
    assert first_request(text) == expected


def test_without_requests_there_is_nothing_to_answer(model, tmp_path):
    with pytest.raises(InputError, match="no harmful requests"):
        red_team(model, None, [], Judge(), tmp_path / "a", SETTINGS)


@pytest.mark.parametrize("wrong", [{"per_seed": 0}, {"batch_size": 0}, {"temperature": 0.0}, {"top_p": 2.0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(InputError):
        RedTeam(**wrong)


# -- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, its neurons and two requests."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny.model(max_position_embeddings=2048)
    model.save(folder / "model")
    some_neurons(model).save(folder / "neurons.json")
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": "how?"}) + "\n" + json.dumps({"prompt": "why?"}) + "\n")
    return folder


def command(world, out, *more):
    words = [
        "redteam", str(world / "model"), "--out", str(out), "--neurons", str(world / "neurons.json"),
        "--prompts", str(world / "asked.jsonl"), "-n", "2", "--max-new-tokens", "6", *more,
    ]  # fmt: skip
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, words)


def test_the_command_prints_counts_and_no_text(world, tmp_path):
    done = command(world, tmp_path / "out")
    assert done.exit_code == 0, done.output
    results = read_json(tmp_path / "out" / "yield" / "results.json")
    assert all(line in done.output for line in table(RedTeamResults.load(tmp_path / "out")))
    assert (results["prompts"]["n"], results["answers"]["n"]) == (24, 4)
    for kind in ("prompts", "answers"):
        assert not any(len(r["text"]) > 3 and r["text"] in done.output for r in samples(tmp_path / "out", kind))
    again = command(world, tmp_path / "out")
    assert again.exit_code == 0
    assert read_json(tmp_path / "out" / "yield" / "results.json") == results
    redone = command(world, tmp_path / "out", "--redo", "answers", "--seed", "0")
    assert redone.exit_code == 0, redone.output
    assert read_json(tmp_path / "out" / "yield" / "results.json") == results


def test_mistakes_at_the_command_are_one_sentence(world, tmp_path):
    for more, sentence in (
        (("--redo", "answer"), "there is no stage 'answer'"),
        (("--temperature", "0"), "temperature must be above 0"),
        (("--judge", "nobody"), "there is no judge 'nobody'"),
    ):
        done = command(world, tmp_path / "out", *more)
        assert done.exit_code == 2
        assert sentence in done.output
