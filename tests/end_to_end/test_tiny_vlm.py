"""The run of examples/configs/tiny-vlm.toml: end to end on images, interrupted anywhere, on one process and on two."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeneuron.analysis.analyser import Analyser
from safeneuron.attacks.checkpoint import write_pruned
from safeneuron.attacks.pruning import respond
from safeneuron.config.schema import Config
from safeneuron.config.toml import parse_config, read_config
from safeneuron.data.images import opened
from safeneuron.data.prompts import read_prompts
from safeneuron.data.rows import Source
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.vision import vision_parameters
from safeneuron.models.vision_tower import fingerprint_of_towers, measure_towers, pruned_anywhere, towers_of
from safeneuron.neurons.interventions import Edit
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.statistics import ActivationStats
from safeneuron.reporting.rendering import ShownAnswer
from safeneuron.reporting.report import example_quoted
from safeneuron.runs.run import Run
from safeneuron.runs.show import explain
from safeneuron.runtime.files import read_json, read_lines
from safeneuron.selection.linear_probe import probe
from safeneuron.selection.scores import Scores
from safeneuron.training.on_policy import on_policy_pairs
from tests import ROOT
from tests.helpers import tiny_run
from tests.helpers.sample_results import sample_examples
from tests.helpers.tiny_run import Watch, execute
from tests.programs.ranks_program import Judge
from tests.runtime.test_distributed import ENVIRONMENT, TORCHRUN

pytestmark = pytest.mark.slow
CONFIGS = ROOT / "examples" / "configs"
SMALL = ["variants={}", "align.epochs=1", "align.save_every=1", 'attack.sets=["FULL"]', "attack.max_new_tokens=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the script writes."""
    folder = tmp_path_factory.mktemp("world")
    script = runpy.run_path(str(CONFIGS / "make_tiny_vlm.py"))
    script["main"](folder / "runs" / "tiny-vlm-start")
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def smaller() -> str:
    """The config with fewer prompts."""
    return (CONFIGS / "tiny-vlm.toml").read_text().replace("count = 24", "count = 6").replace("count = 8", "count = 3")


def settings() -> Config:
    return parse_config(smaller(), "tiny-vlm.toml", SMALL)


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        execute(settings(), world / "whole")
    return world / "whole"


def test_the_config_itself_is_valid_and_says_what_to_run_first() -> None:
    text = (CONFIGS / "tiny-vlm.toml").read_text()
    config = read_config(CONFIGS / "tiny-vlm.toml")
    assert config.data.unsafe[0].as_image
    assert f"python examples/configs/make_tiny_vlm.py {Path(config.model.name).parent}" in text


def test_every_stage_saw_the_images(finished: Path) -> None:
    unsafe = [Prompt.from_record(record, finished / "data") for record in read_lines(finished / "data/unsafe.jsonl")]
    assert len(unsafe) == 6
    assert all(opened(prompt.image).size == (760, 760) for prompt in unsafe)
    assert {prompt.written for prompt in unsafe} == {"Answer the question in the image."}
    answers = read_lines(finished / "T1/attack/adaptive-FULL/harmful.jsonl")
    assert sorted(bool(answer.get("image")) for answer in answers) == [False] * 4 + [True] * 3
    asked = {prompt.text for prompt in read_prompts("twins:unsafe", split="test", count=4)}
    assert {answer["prompt"] for answer in answers} == asked, "the question, not the words beside the image"
    assert len(read_lines(finished / "T0/pairs/pairs.jsonl")) == len(list((finished / "T0/pairs/images").iterdir()))
    frozen = read_json(finished / "T1/align/frozen.json")
    assert frozen["frozen_identical"]
    assert frozen["frozen"] > 0


def test_the_eyes_of_the_aligned_model_are_those_of_the_first(finished: Path, here: Path) -> None:
    first, last = (
        load(folder, "float32", "cpu") for folder in ("runs/tiny-vlm-start/model", finished / "T1/align/model")
    )
    for old, new in zip(vision_parameters(first.network), vision_parameters(last.network), strict=True):
        assert torch.equal(old, new)
    assert last.processor is not None
    assert last.fingerprint == first.fingerprint


def test_the_report_names_the_images(finished: Path) -> None:
    page, text = ((finished / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert re.search(r"\[image: [0-9a-f]{16}\.png\]", page)
    assert re.search(r"\[image: [0-9a-f]{16}\.png\]", text)


def test_the_names_of_images_are_escaped_in_the_report() -> None:
    answer = replace(sample_examples()[0], image="<b>*a*</b>.png")
    assert "<b>" not in example_quoted(ShownAnswer(answer, "r", 0))


EYES = [
    "measure.part=vision",
    "measure.pooling=mean",
    "align.rounds=0",
    "select.density=0.3",
    'attack.operators=["mean"]',
]


@pytest.fixture(scope="module")
def looked(world: Path) -> Path:
    """A run without training on the neurons of the eyes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        execute(parse_config(smaller(), "tiny-vlm.toml", [*SMALL, *EYES]), world / "eyes")
    return world / "eyes"


def test_a_run_on_the_neurons_of_the_eyes(looked: Path, here: Path) -> None:
    model = load("runs/tiny-vlm-start/model", "float32", "cpu")
    neurons = NeuronSet.load(looked / "T0/select/neurons.json")
    assert neurons.fingerprint == fingerprint_of_towers(model)
    assert neurons.widths == tuple(place.width for place in towers_of(model))
    stats = ActivationStats.load(looked / "T0/measure/stats.safetensors")
    unsafe, safe = (
        [Prompt.from_record(record, looked / "data") for record in read_lines(looked / f"data/{role}.jsonl")]
        for role in ("unsafe", "safe")
    )
    assert torch.equal(stats.unsafe.mean, measure_towers(model, unsafe, safe).unsafe.mean)
    asked = [Prompt.from_record(one, looked / "data") for one in read_lines(looked / "data/test_unsafe.jsonl")]
    streams = {}
    for name, edit in (
        ("ORI", None), ("static-FULL", neurons), ("operator-mean", Edit.mean(neurons, stats))
    ):  # fmt: skip
        lines = read_lines(looked / f"T0/attack/{name}/harmful.jsonl")
        streams[name] = [line["response"] for line in sorted(lines, key=lambda line: line["index"])]
        with pruned_anywhere(model, edit):
            batches = respond(model, asked, max_new_tokens=4, batch_size=8)
            said = sorted((one for batch in batches for one in batch), key=lambda one: one.index)
        assert streams[name] == [one.response for one in said]
    changed = [old != new for old, new in zip(streams["ORI"], streams["static-FULL"], strict=True)]
    assert any(change for change, prompt in zip(changed, asked, strict=True) if prompt.image)
    assert not any(change for change, prompt in zip(changed, asked, strict=True) if not prompt.image), "it saw nothing"
    assert "feed-forward networks of the vision tower and the projector" in (looked / "report/report.md").read_text()
    assert "of the vision tower of the model" in " ".join(explain(looked / "T0/select/neurons.json"))


def test_what_does_not_go_with_the_neurons_of_the_eyes(looked: Path, here: Path) -> None:
    with pytest.raises(InputError, match="part"):
        execute(parse_config(smaller(), "tiny-vlm.toml", [*SMALL, *EYES, "measure.part=text"]), looked)
    with pytest.raises(InputError, match="an analysis looks into the text decoder"):
        Analyser(parse_config(smaller(), "tiny-vlm.toml", [*SMALL, *EYES]), Run.create(looked), Watch())
    model = load("runs/tiny-vlm-start/model", "float32", "cpu")
    with pytest.raises(InputError, match="vision tower"):
        write_pruned(model, NeuronSet.load(looked / "T0/select/neurons.json"), looked / "pruned")
    for change, said in (
        ("align.rounds=1", r"the vision tower stays as it is in training.*set align.rounds = 0"),
        ("measure.pooling=last", "images have no last token"),
        ('attack.selectors=["probe"]', r"attack.selectors is for neurons of the text decoder"),
        ('attack.knowledge=["iterated"]', "attack.knowledge = 'iterated' is for neurons of the text"),
        ("attack.backend=vllm", "attack.backend = 'vllm' is for neurons of the text"),
        ('variants={dpo={freeze="none"}}', "variants = {}"),
    ):
        with pytest.raises(InputError, match=said):
            parse_config(smaller(), "tiny-vlm.toml", [*SMALL, *EYES, change])


def test_runs_from_before_there_were_parts_still_count(finished: Path) -> None:
    assert "part" not in read_json(finished / "T0/measure/done.json")["settings"]["measure"]


@pytest.mark.parametrize("stop_after", [21])
def test_an_interrupted_run_goes_on_to_the_same_results(finished: Path, here: Path, tmp_path: Path, stop_after: int):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        execute(settings(), folder, Watch(stop_after))
    execute(settings(), folder)
    assert tiny_run.results(folder) == tiny_run.results(finished)


def test_two_processes_measure_and_answer_the_same_and_train_together(finished: Path, here: Path, tmp_path: Path):
    config, folder = tmp_path / "small.toml", tmp_path / "two"
    config.write_text(smaller())
    words = [word for change in SMALL for word in ("--set", change)]
    done = subprocess.run(
        [*TORCHRUN, "-m", "safeneuron", "run", str(config), "--out", str(folder), *words],
        cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (Scores.load(run / "T0/select/scores.safetensors") for run in (finished, folder))
    torch.testing.assert_close(one.d, two.d, rtol=1e-6, atol=1e-6)
    for name in ("ORI", "static-FULL", "control-random"):
        streams = [
            sorted(read_lines(run / "T0/attack" / name / "harmful.jsonl"), key=lambda answer: answer["index"])
            for run in (finished, folder)
        ]
        assert streams[0] == streams[1]
    logs = [read_lines(run / "T1/align/train.jsonl") for run in (finished, folder)]
    assert [round(step["loss"], 3) for step in logs[0]] == [round(step["loss"], 3) for step in logs[1]]
    assert read_json(folder / "T1/align/frozen.json")["frozen_identical"]


def test_on_policy_pairs_and_rivals_take_images_too(here: Path, tmp_path: Path) -> None:
    """The model's answers are babble, so that a judge is needed that takes anything."""
    model = load("runs/tiny-vlm-start/model", "float32", "cpu")
    asked = [Source(f"twins:{kind}", split="test", count=4, as_image=True) for kind in ("unsafe", "safe")]
    unsafe, safe = (read_prompts(source) for source in asked)
    neurons = NeuronSet.of({0: [1]}, model.widths, model.fingerprint)
    pairs = on_policy_pairs(model, unsafe, safe, neurons, Judge(), max_new_tokens=4)
    assert pairs
    assert all(isinstance(pair.image, bytes) for pair in pairs)
    assert {pair.prompt[0]["content"] for pair in pairs} == {"Answer the question in the image."}
    assert "arrest" not in json.dumps([pair.prompt for pair in pairs])
    assert probe(model, unsafe, safe) is not None
