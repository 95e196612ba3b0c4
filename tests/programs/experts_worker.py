"""What each of the two processes of test_devices.py does with a mixture of experts, stacked in three dimensions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from safeneuron.data.types import Prompt
from safeneuron.models.forward import MeasurementSettings
from safeneuron.neurons.layout import fingerprint, neurons_at
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime import distributed
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import score
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from tests.helpers import tiny_experts
from tests.helpers.tiny_trainers import plain_trainer
from tests.programs.devices_worker import (
    assert_clipping_counts_free_gradients_only,
    spread,
    train,
    whole,
    with_shipped_config,
)

# Three experts: a process holds two, the other one. The first and the last channel are among the neurons.
SIZES = {"num_experts": 3}
PLACES = [(0, 0, 0), (0, 2, tiny_experts.WIDTH - 1), (1, 0, 5), (1, 1, 7), (1, 1, 9), (1, 2, 5)]


def network(seed: int = 0) -> nn.Module:
    return tiny_experts.network("qwen3-moe", seed, **SIZES).train()


def some_neurons(model: nn.Module) -> NeuronSet:
    return neurons_at(model, PLACES)


def frozen_entries(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which entries the neurons of ``PLACES`` own, the slow and obvious way."""
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    for layer, expert, channel in PLACES:
        gate_up, down = (f"model.layers.{layer}.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
        masks[gate_up][expert, [channel, tiny_experts.WIDTH + channel]] = True
        masks[down][expert, :, channel] = True
    return masks


def assert_only_frozen_stayed(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Weight decay moves every free entry; by chance one may be back where it was."""
    assert before.keys() == after.keys()
    for name, mask in frozen_entries(before).items():
        same = before[name] == after[name]
        assert same[mask].all(), f"{name}: a frozen entry moved"
        assert int(same[~mask].sum()) <= 2, f"{name}: {int(same[~mask].sum())} free entries did not move"


def loop(_: Path, kind: str, bf16: bool = False, parts: int = 1) -> None:
    """Frozen in the middle of training, with momentum in the optimizer, and free again afterwards."""
    model = network()
    known_as = fingerprint(model)
    model = spread(model, kind, bf16)
    assert fingerprint(model) == known_as
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 1, True, parts, bf16)
    before, neurons = whole(model), some_neurons(model)
    with frozen(model, neurons, optimizer) as freeze:
        train(model, optimizer, 2, True, parts, bf16)
    after = whole(model)
    assert_only_frozen_stayed(before, after)
    alone = network()
    alone.load_state_dict(after, assign=True)
    assert freeze.digest() == Freeze(alone, some_neurons(alone)).digest()
    train(model, optimizer, 1, True, parts, bf16)
    assert freeze.changed(), "what was frozen is free again"


def clipping_counts_free_gradients_only(_: Path, kind: str) -> None:
    assert_clipping_counts_free_gradients_only(spread(network(), kind), some_neurons, frozen_entries)


def one_bit_of_one_expert_is_seen_by_all(_: Path) -> None:
    """Expert 2 is the second process's alone."""
    model = spread(network(), "fsdp2")
    freeze = Freeze(model, some_neurons(model))
    digest = freeze.digest()
    local = model.model.layers[0].mlp.experts.down_proj.to_local()
    if dist.get_rank() == 1:
        with torch.no_grad():
            local.view(torch.int32)[0, 3, tiny_experts.WIDTH - 1] ^= 1
    assert freeze.changed() == ["model.layers.0.mlp.experts.down_proj"], freeze.changed()
    assert freeze.digest() != digest
    freeze.restore()
    freeze.verify()
    assert freeze.digest() == digest


def trained_and_resumed(folder: Path, **changes: object) -> None:
    """Two steps, a checkpoint, two more from it on a new network: frozen throughout, in the files too."""
    model = network()
    before, neurons = whole(model), some_neurons(model)
    plain_trainer(model, folder, [FreezeNeurons(neurons)], max_steps=2, **changes).train()
    callback = FreezeNeurons(neurons)
    trainer = plain_trainer(network(), folder, [callback], **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    digest = callback.freeze.digest()
    for steps in (2, 4):
        with distributed.whole_weights():
            saved = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{steps}", dtype="float32")
        assert_only_frozen_stayed(before, whole(saved))
        assert Freeze(saved, some_neurons(saved)).digest() == digest


def measured(_: Path) -> None:
    """The prompts are dealt to the processes, and each neuron's count, mean and deviations are those of one process."""
    model = tiny_experts.model("qwen3-moe", **SIZES)
    unsafe = [Prompt(f"how to break {'it ' * (number % 4)}{number}") for number in range(13)]
    safe = [Prompt(f"why bake {'it ' * (number % 3)}{number}") for number in range(11)]
    for pooling in ("last", "mean"):
        settings = MeasurementSettings(pooling=pooling, batch_tokens=40)
        together = measure(model, unsafe, safe, settings)
        with distributed.alone():
            alone = measure(model, unsafe, safe, settings)
        for ours, theirs in ((together.unsafe, alone.unsafe), (together.safe, alone.safe)):
            assert ours.count == theirs.count
            assert torch.equal(ours.per_neuron, theirs.per_neuron)
            assert pooling == "mean" or ours.counts is not None, "experts have counts of their own"
            torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours.m2, theirs.m2, rtol=1e-12, atol=1e-12)
        scores = score(together), score(alone)
        assert scores[0].unscored == scores[1].unscored
        for name in ("d", "shift", "z", "t"):
            ours, theirs = (vars(one)[name] for one in scores)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


CASES: dict[str, Callable[[Path], None]] = {
    "experts measured by two processes": measured,
    "experts, ddp": partial(loop, kind="ddp"),
    "experts, fsdp2": partial(loop, kind="fsdp2"),
    "experts, fsdp2, bf16, two parts": partial(loop, kind="fsdp2", bf16=True, parts=2),
    **{
        f"clipping counts free gradients of experts only, {kind}": partial(
            clipping_counts_free_gradients_only, kind=kind
        )
        for kind in ("ddp", "fsdp2")
    },
    "one bit of one expert is seen by all": one_bit_of_one_expert_is_seen_by_all,
    "transformers' trainer with experts, fsdp2 of accelerate": partial(
        with_shipped_config, name="eight_gpus_fsdp2.yaml", train_it=trained_and_resumed
    ),
}


if __name__ == "__main__":
    from tests.programs.devices_worker import run

    run({name: CASES[name] for name in sys.argv[2:] or CASES}, Path(sys.argv[1]))
