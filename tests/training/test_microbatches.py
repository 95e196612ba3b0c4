"""Micro-batches in parts, and halved when memory runs out: the same training as with all the memory there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel

from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.runtime.devices import MemoryShortage
from safeneuron.training.ablation import Ablation
from safeneuron.training.alignment import Alignment, align
from safeneuron.training.microbatches import merged, pair_count, part_of
from safeneuron.training.settings import TrainingSettings
from tests import rarely
from tests.training.test_freezing import some_neurons

LENGTHS = (3, 40, 7, 21, 2, 33, 11, 5)
PAIRS = [
    Pair(({"role": "user", "content": f"question {i}"},), "No. " * LENGTHS[i], "Sure " * LENGTHS[-1 - i], "test")
    for i in range(8)
]


def run(model: Model, frozen: bool = True, **changes: object) -> Alignment:
    settings = {
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "warmup_share": 0.0,
        "max_length": 200,
        "precision": "float32",
        **changes,
    }
    pairs = settings.pop("pairs", PAIRS)
    ablated = settings.pop("ablated", None)
    ablation = Ablation(ablated) if ablated is not None else None
    neurons = some_neurons(model.network) if frozen else None
    return align(model, pairs, neurons, TrainingSettings(**settings), ablation=ablation)


class Scarce:
    """A memory in which a pass of more than ``most`` rows fails, in the forward or half-way in the backward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, where: str) -> None:
        self.most = most
        self.where = where
        self.rows: list[int] = []
        self.failed = 0
        forward = LlamaModel.forward

        def scarce(network: LlamaModel, *args: object, **kwargs: object) -> object:
            ids = kwargs["input_ids"]
            self.rows.append(len(ids))
            too_much = len(ids) > self.most
            if too_much and self.where == "forward":
                self.fail()
            hook = network.layers[1].register_forward_hook(self.fail_backward) if too_much else None
            try:
                return forward(network, *args, **kwargs)
            finally:
                if hook is not None:
                    hook.remove()

        monkeypatch.setattr(LlamaModel, "forward", scarce)

    def fail_backward(self, module: object, inputs: object, out: Tensor) -> None:
        """Fail when the gradient comes to this layer's output: those of the layers above have been added by then."""
        if out.requires_grad:
            out.register_hook(lambda gradient: self.fail())

    def fail(self) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("out of memory, as if")


def assert_same_training(first: Alignment, second: Alignment) -> None:
    for one, other in zip(first.log, second.log, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5)
    for (name, one), other in zip(
        first.model.network.named_parameters(), second.model.network.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)
    assert first.frozen_sha256 == second.frozen_sha256


@pytest.mark.parametrize(
    ("at_once", "sft_weight"), [rarely(1, 0.0), (1, 1.0), (2, 0.0), rarely(2, 1.0), rarely(3, 0.0), rarely(3, 1.0)]
)
def test_parts_train_as_the_whole_does(tiny_model, at_once, sft_weight):
    # Seven pairs: the last micro-batch of an epoch has three, whose parts are not equal.
    settings = {"sft_weight": sft_weight, "pairs": PAIRS[:7]}
    whole = run(tiny_model, **settings)
    parts = run(tiny_model, at_once=at_once, **settings)
    assert_same_training(parts, whole)
    assert (whole.at_once, parts.at_once) == (0, at_once)


def test_parts_take_no_more_pairs_at_once(tiny_model, monkeypatch):
    memory = Scarce(monkeypatch, most=4, where="forward")
    run(tiny_model, at_once=2)
    assert memory.failed == 0
    assert set(memory.rows) == {4}


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
@pytest.mark.parametrize("where", [rarely("forward"), "backward"])
@pytest.mark.parametrize(("most", "micro", "batch"), [rarely(4, 4, 4), rarely(2, 4, 4), (2, 2, 4), (2, 4, 8)])
def test_a_step_that_ran_out_of_memory_is_the_same_step(tiny_model, monkeypatch, where, most, micro, batch):
    settings = {"micro_batch_size": micro, "batch_size": batch, "sft_weight": 0.5, "epochs": 3}
    whole = run(tiny_model, **settings)
    memory = Scarce(monkeypatch, most, where)
    halved = run(tiny_model, **settings)
    assert memory.failed > 0
    assert_same_training(halved, whole)
    assert halved.at_once == most // 2


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
def test_memory_that_runs_out_within_an_accumulated_step(tiny_model, monkeypatch):
    """The second micro-batch fails in its backward pass, after the first has left its gradients."""
    settings = {"micro_batch_size": 2, "batch_size": 8, "epochs": 1}
    whole = run(tiny_model, **settings)
    memory = Scarce(monkeypatch, most=4, where="backward")
    fail = memory.fail

    def fail_later() -> None:
        if memory.rows.count(4) > 4 + 2:
            fail()

    # The reference takes four passes of four rows; then the third micro-batch is the first that finds less memory.
    memory.fail = fail_later
    memory.most = 3
    halved = run(tiny_model, **settings)
    assert memory.failed == 1
    assert_same_training(halved, whole)
    assert halved.at_once == 1


def test_it_is_told_once_and_remembered(tiny_model, monkeypatch):
    memory = Scarce(monkeypatch, most=4, where="backward")
    with pytest.warns(MemoryShortage, match="training ran out of memory with 4 at once; it goes on with 2") as told:
        run(tiny_model)
    assert len([one for one in told if issubclass(one.category, MemoryShortage)]) == 1
    assert memory.failed == 1


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
def test_one_pair_that_is_too_much_is_explained(tiny_model, monkeypatch):
    Scarce(monkeypatch, most=1, where="forward")
    with pytest.raises(InputError, match=r"out of memory with one at a time \(.*as if\); use gradient_checkpointing"):
        run(tiny_model)


def test_another_error_is_not_taken_for_a_lack_of_memory(tiny_model, monkeypatch):
    memory = Scarce(monkeypatch, most=4, where="backward")

    def fail() -> None:
        raise RuntimeError("something else")

    memory.fail = fail
    with pytest.raises(RuntimeError, match="something else"):
        run(tiny_model)


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
def test_halving_goes_with_gradient_checkpointing(tiny_model, monkeypatch):
    whole = run(tiny_model, at_once=2, gradient_checkpointing=True)
    Scarce(monkeypatch, most=4, where="backward")
    assert_same_training(run(tiny_model, gradient_checkpointing=True), whole)


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
def test_halving_goes_with_bfloat16(tiny_model, monkeypatch):
    """The reference was computed for whole micro-batches before memory ran out, which bfloat16 rounds otherwise."""
    whole = run(tiny_model, at_once=2, precision="bfloat16")
    Scarce(monkeypatch, most=4, where="backward")
    halved = run(tiny_model, precision="bfloat16")
    assert [one["loss"] for one in halved.log] == pytest.approx([one["loss"] for one in whole.log], rel=2e-2)


@pytest.mark.filterwarnings("ignore::safeneuron.runtime.devices.MemoryShortage")
def test_ablated_neurons_stay_ablated_in_every_part(tiny_model, monkeypatch):
    ablated = some_neurons(tiny_model.network)
    whole = run(tiny_model, ablated=ablated)
    Scarce(monkeypatch, most=4, where="backward")
    assert_same_training(run(tiny_model, ablated=ablated), whole)


def test_a_part_is_some_pairs_without_the_padding_of_others():
    ids = torch.arange(24).reshape(6, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]] * 2)
    batch = {"input_ids": ids, "attention_mask": mask, "by_pair": torch.tensor([5, 6, 7]), "by_row": torch.arange(6)}
    part = part_of(batch | {"other": "kept"}, range(2, 3))
    assert part["input_ids"].tolist() == [[8], [20]]
    assert part["by_pair"].tolist() == [7]
    assert part["by_row"].tolist() == [2, 5]
    assert part["other"] == "kept"
    assert part_of(batch, range(3)) is batch
    assert pair_count(part_of(batch, range(2))) == 2
    assert part_of(batch, range(2))["input_ids"].shape == (4, 4)


def test_what_parts_log_is_their_mean_by_pairs():
    parts = [(1, {"margin": [4.0], "num_tokens": [10.0]}), (3, {"margin": [0.0], "num_tokens": [30.0], "kl": [2.0]})]
    assert merged(parts) == {"margin": [1.0], "num_tokens": [30.0], "kl": [2.0]}
