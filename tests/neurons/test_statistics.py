"""The statistics file: what was written is read back bit by bit, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safeneuron.errors import InputError
from safeneuron.neurons.statistics import ActivationStats, Moments, load_tensors, save_tensors
from safeneuron.selection.scores import score

WIDTHS = (4, 2)
KIND = "activation statistics"


def some_stats() -> ActivationStats:
    generator = torch.Generator().manual_seed(0)
    unsafe, safe = (torch.randn(count, 6, generator=generator) for count in (5, 9))
    return ActivationStats(Moments.of(unsafe), Moments.of(safe), WIDTHS, "abc", "last")


def rewritten(path: Path, **changes: torch.Tensor | None) -> Path:
    """The file of ``some_stats`` with tensors replaced or, for None, taken out."""
    some_stats().save(path)
    tensors, header = load_tensors(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("_", "."))
        if tensor is not None:
            tensors[name.replace("_", ".")] = tensor
    save_tensors(path, tensors, header)
    return path


def test_round_trip(tmp_path):
    stats = some_stats()
    stats.save(tmp_path / "deep" / "stats.safetensors")
    back = ActivationStats.load(str(tmp_path / "deep" / "stats.safetensors"))
    for ours, theirs in ((stats.unsafe, back.unsafe), (stats.safe, back.safe)):
        assert ours.count == theirs.count
        assert theirs.mean.dtype == theirs.m2.dtype == torch.float64
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.m2, theirs.m2)
    assert (back.widths, back.fingerprint, back.pooling) == (WIDTHS, "abc", "last")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stats.safetensors"]


def test_same_content_gives_the_same_bytes(tmp_path):
    some_stats().save(tmp_path / "a")
    some_stats().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strided_tensors_are_written_as_they_look(tmp_path):
    table = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "t", {"x": table.T, "n": torch.tensor([1, 2])}, {"kind": "table"})
    tensors, header = load_tensors(tmp_path / "t", "table")
    assert torch.equal(tensors["x"], table.T)
    assert tensors["n"].tolist() == [1, 2]
    assert header["kind"] == "table"


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="exist"):
        ActivationStats.load(tmp_path / "stats.safetensors")
    with pytest.raises(InputError, match="exist"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_torn_file(tmp_path, length):
    path = tmp_path / "stats.safetensors"
    some_stats().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="safetensors"):
        ActivationStats.load(path)


def test_file_of_something_else(tmp_path):
    path = tmp_path / "stats.safetensors"
    path.write_text("hello")
    with pytest.raises(InputError, match="safetensors"):
        ActivationStats.load(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match="something else"):
        ActivationStats.load(path)
    save_file({"weight": torch.ones(2)}, path, {"safeneuron": "{torn"})
    with pytest.raises(InputError, match="safetensors"):
        ActivationStats.load(path)


def test_wrong_kind(tmp_path):
    path = tmp_path / "scores.safetensors"
    score(some_stats()).save(path)
    with pytest.raises(InputError, match="scores"):
        ActivationStats.load(path)


def test_wrong_schema(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"safeneuron": json.dumps({"kind": KIND, "schema": 99})})
    with pytest.raises(InputError, match="schema 99"):
        ActivationStats.load(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(tmp_path, value):
    spoilt = torch.zeros(6, dtype=torch.float64)
    spoilt[2] = value
    path = rewritten(tmp_path / "stats.safetensors", safe_m2=spoilt)
    with pytest.raises(InputError, match=r"safe\.m2"):
        ActivationStats.load(path)


@pytest.mark.parametrize(
    ("tensor", "found"), [(None, "None"), (torch.zeros(5), r"\(5,\)"), (torch.zeros(1, 6), r"\(1, 6\)")]
)
def test_missing_vector_or_one_of_another_length(tmp_path, tensor, found):
    path = rewritten(tmp_path / "stats.safetensors", unsafe_mean=tensor)
    with pytest.raises(InputError, match=found):
        ActivationStats.load(path)
