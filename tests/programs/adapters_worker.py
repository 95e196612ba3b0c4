"""What each of the two processes does that test_adapters.py starts: LoRA under DDP and FSDP2, in loops and in align."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from safeneuron.errors import InputError
from safeneuron.neurons.layout import network_of
from safeneuron.training import alignment
from safeneuron.training.alignment import align
from safeneuron.training.freezing import Freeze, frozen
from safeneuron.training.lora import Adapter, adapter_slices, adapters_of
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny
from tests.helpers.frozen_checks import assert_frozen_stayed, network_with_noise, snapshot, some_neurons
from tests.programs.devices_worker import ANATOMIES, refused, run, spread, train, whole
from tests.programs.ranks_program import FSDP2
from tests.training.test_alignment import LN2, PAIRS, chosen_neurons


def spread_with_adapters(network: nn.Module, kind: str) -> nn.Module:
    """What is called in training; under FSDP2 it is the network itself, with layers of PEFT inside."""
    model = get_peft_model(network, LoraConfig(r=3, target_modules="all-linear"))
    return DistributedDataParallel(model) if kind == "ddp" else spread(network, kind)


def changes_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A of each adapter, by the name of the matrix in the plain network."""
    return {
        name.removesuffix(".lora_A.default.weight") + ".weight": weights[name.replace("lora_A", "lora_B")]
        @ weights[name]
        for name in weights
        if "lora_A" in name
    }


def loop(_: Path, kind: str, anatomy: str) -> None:
    family, changes = ANATOMIES[anatomy]
    network = network_with_noise(family, **changes)
    before = snapshot(network)
    called = spread_with_adapters(network, kind)
    assert network_of(called) is network
    neurons = some_neurons(called)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    start = whole(network)
    with frozen(called, neurons, optimizer) as freeze:
        train(called, optimizer, 4, True, 2, False)
        assert any("lora_A" in piece.name for piece in freeze.slices)
    after = whole(network)
    merged = {name: weight.clone() for name, weight in before.items()}
    for name, change in changes_of(after).items():
        merged[name] += change
    width, tiny.WIDTH = tiny.WIDTH, changes.get("intermediate_size", tiny.WIDTH)
    assert_frozen_stayed(before, merged)
    tiny.WIDTH = width
    assert all((merged[name] != before[name]).any() for name in changes_of(after))
    assert all((after[name] == start[name]).all() for name in after if "lora" not in name)


def trained_adapter_is_refused_by_all(_: Path, kind: str) -> None:
    """The row that changes neuron 47 of layer 0 lies in one process only."""
    called = spread_with_adapters(network_with_noise(), kind)
    up = network_of(called).model.layers[0].mlp.up_proj.lora_B["default"].weight
    with torch.no_grad():
        if not isinstance(up, DTensor):
            up[47, 0] = 1e-6
        elif dist.get_rank() == 1:
            up.to_local()[-1, 0] = 1e-6
    refused(InputError, "already changes neurons", lambda: adapter_slices(called, some_neurons(called)))


def aligned(folder: Path, sharded: bool) -> None:
    """The same losses as in one process are not to be had, the batches being others; the same guarantees are."""
    model = tiny.model()
    before, neurons = snapshot(model.network), chosen_neurons(model)
    training = TrainingSettings(
        learning_rate=1e-2, epochs=2, batch_size=4, micro_batch_size=2, warmup_share=0.0, max_length=64,
        precision="float32", lora_rank=4, save_every=2,
    )  # fmt: skip
    spread_out: list[bool] = []

    def spy(policy: nn.Module) -> list[Adapter]:
        found = adapters_of(policy)
        spread_out.extend(isinstance(adapter.up, DTensor) for adapter in found)
        return found

    with (
        patch.object(alignment, "adapters_of", spy),
        patch.dict(os.environ, FSDP2 if sharded else {}),
        # accelerate shards only on GPUs, so it is told that these are some; the rest of FSDP2 is the real one.
        patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        if sharded
        else patch.dict(os.environ),
    ):
        result = align(model, PAIRS, neurons, training, checkpoints=folder)
    assert set(spread_out) == {sharded}
    assert abs(result.log[0]["loss"] - LN2) < 1e-5
    assert result.steps == 4
    assert result.frozen_identical
    assert result.frozen_sha256 == Freeze(result.model, neurons).digest()
    after = snapshot(result.model.network)
    assert_frozen_stayed(before, after)
    assert all(torch.equal(weight, before[name]) != ("_proj" in name) for name, weight in after.items())
    sizes = torch.tensor([sum(float(weight.double().square().sum()) for weight in after.values())])
    mine = sizes.clone()
    dist.all_reduce(sizes)
    assert torch.equal(sizes, 2 * mine), "both have the same result"


CASES: dict[str, Callable[[Path], None]] = {
    **{
        f"loop, {kind}, {anatomy}": partial(loop, kind=kind, anatomy=anatomy)
        for kind in ("ddp", "fsdp2")
        for anatomy in ("uneven", "fused")
    },
    **{
        f"trained adapter is refused, {kind}": partial(trained_adapter_is_refused_by_all, kind=kind)
        for kind in ("ddp", "fsdp2")
    },
    "align, ddp": partial(aligned, sharded=False),
    "align, fsdp2": partial(aligned, sharded=True),
}


if __name__ == "__main__":
    run({name: CASES[name] for name in sys.argv[2:] or CASES}, Path(sys.argv[1]))
