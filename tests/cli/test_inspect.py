"""The verbs that look into what is there: ``show`` and ``compare``; ``publish`` is tested with the publication."""

import pytest
import torch

from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.selection.ranking import Ranking
from tests.helpers import planted
from tests.helpers.command_line import invoke, refusal


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a planted model, its neurons, others, a sibling's, another shape's, and two rankings."""
    folder = tmp_path_factory.mktemp("attacks")
    model = planted.model()
    neurons = planted.neurons(model)
    neurons.save(folder / "planted.json")
    (neurons.random_like(0, avoid=neurons) | NeuronSet.of({1: [5]}, model.widths, model.fingerprint)).save(
        folder / "other.json"
    )
    neurons.transferred("0123456789abcdef").save(folder / "sibling.json")
    NeuronSet.of({0: [1]}, (8,), "0123456789abcdef").save(folder / "shape.json")
    for seed in (0, 1):
        values = torch.randn(144, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Ranking(values, model.widths, model.fingerprint, f"r{seed}").save(folder / f"r{seed}.safetensors")
    return folder


def test_compare_prints_the_overlap(world):
    done = invoke("compare", world / "planted.json", world / "other.json")
    assert done.exit_code == 0, done.output
    assert "first   planted: 5 of 144 neurons (3.47%)" in done.output
    assert "in both 1; by chance 0.3; Jaccard 0.100" in done.output
    assert "correlation" not in done.output


def test_compare_with_rankings(world):
    scores = ["--scores", world / "r0.safetensors", world / "r1.safetensors"]
    done = invoke("compare", world / "planted.json", world / "planted.json", *scores)
    assert done.exit_code == 0, done.output
    assert "Jaccard 1.000" in done.output
    assert "rank correlation of the scores" in done.output


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("sibling.json", "different models of one shape"),
        ("shape.json", "the second of one with 1 layers and 8 neurons"),
        ("nothing.json", "nothing.json"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(world, second, said):
    assert said in refusal(invoke("compare", world / "planted.json", world / second))


def test_show_explains_the_run(finished_run):
    folder = finished_run[0]
    done = invoke("show", folder)
    assert done.exit_code == 0
    assert done.stdout.startswith("A run: ")
    assert "ASR in %" in done.stdout
    assert "Scores of 144 neurons" in invoke("show", folder / "T0" / "select" / "scores.safetensors").stdout
