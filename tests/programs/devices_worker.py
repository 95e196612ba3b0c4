"""What each of the two processes of test_devices.py does: torchrun starts this file once, and it runs every case."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from itertools import cycle, product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, training_args

from safeneuron.errors import InputError
from safeneuron.neurons.layout import fingerprint
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from tests import ROOT
from tests.helpers import tiny
from tests.helpers.frozen_checks import (
    add_noise,
    assert_only_frozen_stayed,
    frozen_entries,
    network_with_noise,
    some_neurons,
)
from tests.helpers.tiny_trainers import dpo_trainer, plain_trainer

# No size of "uneven" divides by two, so that the two shards of every parameter differ; of "narrow", some are empty.
ANATOMIES: dict[str, tuple[str, dict[str, object]]] = {
    "uneven": (
        "llama",
        {"hidden_size": 33, "intermediate_size": 49, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "biases": ("llama", {"mlp_bias": True}),
    "fused": ("phi3", {"intermediate_size": 49}),
    "narrow": ("llama", {"hidden_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}),
}


def spread(network: nn.Module, kind: str, bf16: bool = False) -> nn.Module:
    """The network as DDP or FSDP2 trains it; ``hsdp`` has two replicas of one shard."""
    if kind == "ddp":
        return DistributedDataParallel(network)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (2,))
    for layer in network.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    return network


def whole(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name, whole, in every process."""
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    return {
        name.replace("_checkpoint_wrapped_module.", ""): full(parameter.detach()).clone()
        for name, parameter in inner.named_parameters()
    }


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(network: nn.Module, seed: int) -> Tensor:
    """The loss of a batch that each process has for itself."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + seed)
    ids = torch.randint(4, 260, (2, 12), generator=generator)
    return network(input_ids=ids, labels=ids).loss


def backward(network: nn.Module, seed: int, parts: int, bf16: bool = False) -> None:
    """The gradients of one step, exchanged after its last part only."""
    sharded = isinstance(network, FSDPModule)
    for part in range(parts):
        last = part == parts - 1
        if sharded:
            network.set_requires_gradient_sync(last)
        alone = nullcontext() if last or sharded else network.no_sync()
        with alone, torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not sharded):
            (loss_of(network, 10 * seed + part) / parts).backward()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: bool, parts: int, bf16: bool) -> None:
    for step in range(steps):
        backward(network, step, parts, bf16)
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_as_alone(freeze: Freeze, family: str, changes: dict[str, object], weights: dict[str, Tensor]) -> None:
    """The digest and the fingerprint are those of the same model in one piece."""
    alone = network_with_noise(family, **changes)
    alone.load_state_dict(weights, assign=True)
    assert freeze.digest() == Freeze(alone, some_neurons(alone)).digest()


# -- hand-written loops -----------------------------------------------------------------------------------------------


def loop(
    _: Path, kind: str, anatomy: str, bf16: bool, clip: bool, decay: bool, parts: int, checkpointing: bool
) -> None:
    """Frozen in the middle of training, with momentum in the optimizer."""
    family, changes = ANATOMIES[anatomy]
    network = network_with_noise(family, **changes)
    known_as = fingerprint(network)
    if checkpointing:
        network.gradient_checkpointing_enable()
    network = spread(network, kind, bf16)
    assert fingerprint(network) == known_as
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1 if decay else 0.0)
    train(network, optimizer, 1, clip, parts, bf16)
    before, neurons = whole(network), some_neurons(network)
    with frozen(network, neurons, optimizer) as freeze:
        train(network, optimizer, 2, clip, parts, bf16)
    after = whole(network)
    assert_only_frozen_stayed(before, after, every_entry=decay)
    assert_same_as_alone(freeze, family, changes, after)


def clipping_counts_free_gradients_only(_: Path, kind: str) -> None:
    assert_clipping_counts_free_gradients_only(spread(network_with_noise(), kind), some_neurons, frozen_entries)


def assert_clipping_counts_free_gradients_only(
    network: nn.Module,
    neurons_of: Callable[[nn.Module], NeuronSet],
    entries_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    backward(network, 0, 1)
    inner = getattr(network, "module", network)
    gradients = {name: full(parameter.grad).double() for name, parameter in inner.named_parameters()}
    masks = entries_of(gradients)
    free = sum(float(g[~masks[name]].square().sum()) for name, g in gradients.items()) ** 0.5
    everything = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    assert everything > 1.001 * free
    network.zero_grad()
    optimizer = torch.optim.AdamW(network.parameters())
    with frozen(network, neurons_of(network), optimizer):
        backward(network, 0, 1)
        norm = float(full(nn.utils.clip_grad_norm_(network.parameters(), 0.5)))
    assert abs(norm / free - 1) < 1e-5


def one_bit_in_one_process_is_seen_by_all(_: Path, kind: str) -> None:
    """Channel 7 of layer 0 lies in the first half of the rows of the gate, its column in both halves."""
    network = spread(network_with_noise(), kind)
    freeze = Freeze(network, some_neurons(network))
    digest = freeze.digest()
    assert freeze.changed() == []
    feed_forward = freeze.network.get_decoder().layers[0].mlp
    for name, entry, rank in (("gate_proj", (7, 0), 0), ("down_proj", (0, 7), 1)):
        weight = vars(feed_forward)["_modules"][name].weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        with torch.no_grad():
            if dist.get_rank() == rank:
                local.view(torch.int32)[entry] ^= 1
        assert freeze.changed() == [f"model.layers.0.mlp.{name}.weight"], freeze.changed()
        if kind == "fsdp2":
            assert freeze.digest() != digest
        freeze.restore()
        freeze.verify()
        assert freeze.digest() == digest


def frozen_after_an_evaluation(_: Path) -> None:
    """A forward pass alone leaves the outermost parameters of FSDP2 whole; here these are all of them."""
    network = network_with_noise()
    fully_shard(network)
    with torch.no_grad():
        loss_of(network, 0)
    assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    neurons = some_neurons(network)
    freeze = Freeze(network, neurons)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    freeze.attach(optimizer)
    before = whole(network)
    train(network, optimizer, 2, True, 1, False)
    with torch.no_grad():
        loss_of(network, 0)
    freeze.verify()
    assert_only_frozen_stayed(before, whole(network))


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], words: str, action: Callable[[], object]) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        action()


def tensor_parallel_is_refused(_: Path) -> None:
    network = network_with_noise()
    neurons = some_neurons(network)
    mesh = init_device_mesh("cpu", (2,))
    for layer in network.get_decoder().layers:
        weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(1)]))
    refused(InputError, "Shard(dim=1)", lambda: Freeze(network, neurons))


def fsdp1_is_refused(_: Path) -> None:
    network = network_with_noise()
    neurons = some_neurons(network)
    wrapped = FullyShardedDataParallel(network, use_orig_params=True, device_id=torch.device("cpu"))
    refused(InputError, "fsdp_version: 2", lambda: Freeze(wrapped, neurons))
    # A trainer that hands on the model inside shows its flattened parameters only.
    refused(InputError, "flattened", lambda: Freeze(network, neurons))


def different_neurons_are_refused(_: Path) -> None:
    network = network_with_noise()
    neurons = some_neurons(network).random_like(seed=dist.get_rank())
    refused(InputError, "different neurons", lambda: Freeze(network, neurons))


def freezing_before_sharding_is_refused(_: Path) -> None:
    network = network_with_noise()
    freeze = Freeze(network, some_neurons(network))
    spread(network, "fsdp2")
    optimizer = torch.optim.AdamW(network.parameters())
    refused(RuntimeError, "freeze them when it has been", lambda: freeze.attach(optimizer))
    refused(RuntimeError, "freeze them when it has been", freeze.changed)


# -- trainers ---------------------------------------------------------------------------------------------------------


def trained_and_resumed(folder: Path, sharded: bool, **changes: object) -> None:
    """Two steps, a checkpoint, two more from it on a new network: frozen throughout, in the files too."""
    network = network_with_noise()
    before, neurons = whole(network), some_neurons(network)
    plain_trainer(network, folder, [FreezeNeurons(neurons)], max_steps=2, **changes).train()
    assert_only_frozen_stayed(before, load_file(folder / "checkpoint-2" / "model.safetensors"))
    callback = FreezeNeurons(neurons)
    trainer = plain_trainer(network_with_noise(), folder, [callback], **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert all(isinstance(parameter, DTensor) == sharded for parameter in trainer.model.parameters())
    saved = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert_only_frozen_stayed(before, saved)
    assert_same_as_alone(callback.freeze, "llama", {}, saved)


def dpo_with_a_model_sharded_at_loading(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    network = network_with_noise()
    before, neurons = whole(network), some_neurons(network)
    if dist.get_rank() == 0:
        network.save_pretrained(folder / "given")
    dist.barrier()
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "given", distributed_config=DistributedConfig(fsdp_size=2))
        for _ in range(2)
    )
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    callback = FreezeNeurons(neurons)
    dpo_trainer(policy, folder, [callback], ref_model=reference, save_only_model=True).train()
    assert_only_frozen_stayed(before, whole(policy))
    dist.barrier()
    assert_only_frozen_stayed(before, load_file(folder / "checkpoint-4" / "model.safetensors"))


def with_shipped_config(folder: Path, name: str, train_it: Callable[..., None], **changes: object) -> None:
    """As ``accelerate launch --config_file`` would start it, but on two CPU processes instead of its GPUs."""
    given = environment_of(ROOT / "examples" / "configs" / "accelerate" / name)
    given = {name: value for name, value in given.items() if name not in os.environ}
    with (
        patch.dict(os.environ, {**given, "ACCELERATE_TORCH_DEVICE": "cpu"}),
        # On the CPU accelerate would silently take DDP instead of FSDP, and transformers would refuse bfloat16.
        patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
        patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True),
    ):
        train_it(folder, use_cpu=False, gradient_checkpointing=False, **changes)


def environment_of(config: Path) -> dict[str, str]:
    """The environment in which ``accelerate launch`` with this config starts the processes."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    words = ["--config_file", str(config), "--main_process_port", "0", "train.py"]
    settings = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    if settings.use_deepspeed:
        named = [*load_config_from_file(str(config)).deepspeed_config, "mixed_precision"]
        settings.deepspeed_fields_from_accelerate_config = ",".join(named)
        return launch.prepare_deepspeed_cmd_env(settings)[1]
    if settings.multi_gpu or settings.use_fsdp:
        return launch.prepare_multi_gpu_env(settings)
    return launch.prepare_simple_launcher_cmd_env(settings)[1]


def dpo_trained(folder: Path, **changes: object) -> None:
    network = network_with_noise()
    before = whole(network)
    callback = FreezeNeurons(some_neurons(network))
    trainer = dpo_trainer(network, folder, [callback], **changes)
    trainer.train()
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    assert_only_frozen_stayed(before, whole(trainer.model))


def example(folder: Path, **_: object) -> None:
    """The script itself, which compares what it has saved with what it had loaded."""
    if dist.get_rank() == 0:
        model = tiny.model()
        add_noise(model.network)
        model.save(folder / "given")
    dist.barrier()
    words = ["--model", str(folder / "given"), "--steps", "2", "--out", str(folder / "out")]
    script = ROOT / "examples" / "many_devices.py"
    said = io.StringIO()
    path = [str(script.parent), *sys.path]
    with patch.object(sys, "argv", [script.name, *words]), patch.object(sys, "path", path), redirect_stdout(said):
        runpy.run_path(str(script), run_name="__main__")
    assert ("weights are identical" in said.getvalue()) == (dist.get_rank() == 0)


# -- all of them ------------------------------------------------------------------------------------------------------


def matrix() -> dict[str, Callable[[Path], None]]:
    cases: dict[str, Callable[[Path], None]] = {}
    anatomies = cycle(("uneven", "biases", "fused"))
    flags = (False, True)
    for kind, bf16, clip, decay, parts, checkpointing in product(("ddp", "fsdp2"), flags, flags, flags, (1, 2), flags):
        settings = {"bf16": bf16, "clip": clip, "decay": decay, "parts": parts, "checkpointing": checkpointing}
        anatomy = next(anatomies)
        words = [kind, anatomy, *(f"{name}={value}" for name, value in settings.items())]
        cases[", ".join(words)] = partial(loop, kind=kind, anatomy=anatomy, **settings)
    return cases


PLAIN = {"bf16": False, "clip": True, "decay": True, "parts": 2, "checkpointing": False}
CASES: dict[str, Callable[[Path], None]] = {
    **matrix(),
    "empty shards": partial(loop, kind="fsdp2", anatomy="narrow", **PLAIN),
    "hybrid shards": partial(loop, kind="hsdp", anatomy="uneven", **PLAIN),
    **{
        f"{case.__name__}, {kind}": partial(case, kind=kind)
        for case in (clipping_counts_free_gradients_only, one_bit_in_one_process_is_seen_by_all)
        for kind in ("ddp", "fsdp2")
    },
    **{
        case.__name__: case
        for case in (
            frozen_after_an_evaluation,
            tensor_parallel_is_refused,
            fsdp1_is_refused,
            different_neurons_are_refused,
            freezing_before_sharding_is_refused,
            dpo_with_a_model_sharded_at_loading,
        )
    },
    "transformers' trainer, ddp": partial(trained_and_resumed, sharded=False),
    "transformers' trainer, fsdp2 of accelerate": partial(
        with_shipped_config, name="eight_gpus_fsdp2.yaml", train_it=trained_and_resumed, sharded=True
    ),
    "DPO, fsdp2 of accelerate": partial(with_shipped_config, name="eight_gpus_fsdp2.yaml", train_it=dpo_trained),
    "the example, fsdp2 of accelerate": partial(with_shipped_config, name="eight_gpus_fsdp2.yaml", train_it=example),
}


def run(cases: dict[str, Callable[[Path], None]], folder: Path) -> None:
    """Run all cases, and leave what became of each in a file; the first that fails ends it, as the other may wait."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    results: dict[str, str] = {}
    for number, (name, case) in enumerate(cases.items()):
        try:
            case(folder / str(number))
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"process-{dist.get_rank()}.json").write_text(json.dumps(results))
        if results[name]:
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    run({name: CASES[name] for name in sys.argv[2:] or CASES}, Path(sys.argv[1]))
