"""What each of the two processes of test_devices.py does: torchrun starts this file once, and it runs every case."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from safeneuron.ffn import fingerprint
from safeneuron.freezing import Freeze, frozen
from tests.frozen_checks import assert_only_frozen_stayed, network_with_noise, some_neurons

CASES: dict[str, Callable[[Path], None]] = {}
# No size divides by two, so that the two shards of every parameter differ.
UNEVEN = {"hidden_size": 33, "intermediate_size": 49, "num_attention_heads": 3, "num_key_value_heads": 1}
ANATOMIES: dict[str, tuple[str, dict[str, object]]] = {
    "uneven": ("llama", UNEVEN),
    "biases": ("llama", {"mlp_bias": True}),
    "fused": ("phi3", {"intermediate_size": 49}),
}


def whole(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name, whole, in every process."""
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in inner.named_parameters()
    }


def sharded(network: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    policy = policy or MixedPrecisionPolicy()
    for layer in network.get_decoder().layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(network, mp_policy=policy)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    return network


def loss_of(network: nn.Module, seed: int) -> Tensor:
    """Each process sees its own batch."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + seed)
    ids = torch.randint(4, 260, (2, 12), generator=generator)
    return network(input_ids=ids, labels=ids).loss


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, bf16: bool, clip: bool, parts: int) -> None:
    for step in range(steps):
        for part in range(parts):
            last = part == parts - 1
            wait = nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()
            if isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(last)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not isinstance(network, FSDPModule))
            with wait, autocast:
                (loss_of(network, 10 * step + part) / parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def hand_written(
    kind: str, bf16: bool, clip: bool, decay: bool, parts: int, checkpointing: bool, anatomy: str
) -> None:
    family, changes = ANATOMIES[anatomy]
    network = network_with_noise(family, **changes)
    known_as = fingerprint(network)
    if checkpointing:
        network.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    outer = sharded(network, policy) if kind == "fsdp2" else DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(outer.parameters(), lr=1e-2, weight_decay=0.1 if decay else 0.0)
    assert fingerprint(outer) == known_as
    train(outer, optimizer, 1, bf16, clip, parts)  # The freeze begins with momentum in the optimizer.
    neurons = some_neurons(outer)
    before = whole(outer)
    with frozen(outer, neurons, optimizer) as freeze:
        train(outer, optimizer, 2, bf16, clip, parts)
        assert freeze.changed() == []
    after = whole(outer)
    assert_only_frozen_stayed(before, after, every_entry=decay)
    alone = network_with_noise(family, **changes)
    alone.load_state_dict(after)
    assert freeze.digest() == Freeze(alone, some_neurons(alone)).digest()


def matrix():
    for kind, bf16, clip, decay, parts, checkpointing in itertools.product(
        ("ddp", "fsdp2"), (False, True), (False, True), (False, True), (1, 2), (False, True)
    ):
        anatomy = list(ANATOMIES)[len(CASES) % 3]
        name = f"{kind}-{'bf16' if bf16 else 'fp32'}-{clip=}-{decay=}-{parts=}-{checkpointing=}-{anatomy}"
        CASES[name] = lambda folder, args=(kind, bf16, clip, decay, parts, checkpointing, anatomy): hand_written(*args)

matrix()

def main(folder: Path) -> None:
    import time
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    results = {}
    for name, case in CASES.items():
        start = time.time()
        try:
            case(folder)
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
        if dist.get_rank()==0: print(name, time.time()-start, results[name], flush=True)
        if results[name] != "passed":
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
