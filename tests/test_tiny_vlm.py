"""The run of configs/tiny-vlm.toml: end to end on images, interrupted anywhere, on one process and on two."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from safeneuron.config import Config, parse_config, read_config
from safeneuron.data import Prompt, read_prompts
from safeneuron.models import load
from safeneuron.neurons import NeuronSet
from safeneuron.pairing import on_policy_pairs
from safeneuron.pictures import opened
from safeneuron.probing import probe
from safeneuron.reporting import quoted
from safeneuron.rows import Source
from safeneuron.runs import read_json, read_lines
from safeneuron.selecting import Scores
from safeneuron.vision import parameters_of_sight
from tests import tiny_run
from tests.ranks_program import Judge
from tests.test_ranks import ENVIRONMENT, TORCHRUN
from tests.tiny_run import Watch, execute

CONFIGS = Path(__file__).parents[1] / "configs"
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
    assert f"python configs/make_tiny_vlm.py {Path(config.model.name).parent}" in text


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
    for old, new in zip(parameters_of_sight(first.network), parameters_of_sight(last.network), strict=True):
        assert torch.equal(old, new)
    assert last.processor is not None
    assert last.fingerprint == first.fingerprint


def test_the_report_names_the_images(finished: Path) -> None:
    page, text = ((finished / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert re.search(r"\[image: [0-9a-f]{16}\.png\]", page)
    assert re.search(r"\[image: [0-9a-f]{16}\.png\]", text)


def test_the_names_of_images_are_escaped_in_the_report() -> None:
    example = {"prompt": "q", "response": "r", "verdict": "refused", "hidden": 0, "image": "<b>*a*</b>.png"}
    assert "<b>" not in quoted(example)


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
