"""What each of the two processes of test_devices.py does where DeepSpeed is installed; as devices_worker.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from safeneuron.errors import InputError
from safeneuron.neurons.layout import fingerprint
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from tests.helpers.frozen_checks import (
    assert_only_frozen_stayed,
    frozen_entries,
    network_with_noise,
    snapshot,
    some_neurons,
)
from tests.helpers.tiny_trainers import arguments, dpo_trainer, plain_trainer
from tests.programs import experts_worker
from tests.programs.devices_worker import ANATOMIES, loss_of, refused, run, with_shipped_config


def new_network(family: str = "llama", **changes: object) -> nn.Module:
    """A network in one piece; what an earlier trainer has left behind would share it out while it is made."""
    unset_hf_deepspeed_config()
    return network_with_noise(family, **changes)


def whole(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters by name, whole, in every process, as DeepSpeed itself puts them together."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(network.parameters())):
        return snapshot(network)


def masters(network: nn.Module) -> dict[str, Tensor]:
    """The master copies, in the same way."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in network.named_parameters()}


def engine_of(network: nn.Module, stage: int, bf16: bool = False, parts: int = 1, clip: bool = True, **zero: object):
    """The network as DeepSpeed trains it."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": 0.5 if clip else 0.0,
        # Above the size of some parameters only, which stay in one piece.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    if "grad_accum_dtype" in zero:
        settings["data_types"] = {"grad_accum_dtype": settings["zero_optimization"].pop("grad_accum_dtype")}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    return deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]


def train(engine, steps: int, parts: int = 1) -> None:
    for number in range(steps * parts):
        engine.backward(loss_of(engine, number))
        engine.step()


def loop(_: Path, stage: int, anatomy: str, bf16: bool, clip: bool, parts: int, kind: str = "", **zero: object) -> None:
    """Frozen in the middle of training, with momentum in the optimizer; master copies and weights stay."""
    family, changes = ANATOMIES[anatomy]
    network = new_network(family, **changes)
    known_as = fingerprint(network)
    engine = engine_of(network, stage, bf16, parts, clip, **zero)
    assert kind in type(engine.optimizer).__name__
    assert fingerprint(engine) == known_as
    train(engine, 1, parts)
    before, masters_before, neurons = whole(network), masters(network) if stage else {}, some_neurons(engine)
    with frozen(engine, neurons, engine.optimizer) as freeze:
        train(engine, 2, parts)
    after = whole(network)
    assert_only_frozen_stayed(before, after, every_entry=not bf16)
    if stage:
        assert_only_frozen_stayed(masters_before, masters(network))
    alone = new_network(family, **changes)
    alone.load_state_dict(after, assign=True)
    assert freeze.digest() == Freeze(alone, some_neurons(alone)).digest()
    train(engine, 1, parts)  # What was frozen is free again.
    refused(RuntimeError, "have changed", freeze.verify)


def experts(_: Path, stage: int, bf16: bool) -> None:
    """The same with a mixture of experts, each of whose matrices is a run of runs of the flat masters."""
    unset_hf_deepspeed_config()
    network = experts_worker.network()
    known_as = fingerprint(network)
    engine = engine_of(network, stage, bf16, parts=2)
    assert fingerprint(engine) == known_as
    train(engine, 1, 2)
    before, masters_before, neurons = whole(network), masters(network), experts_worker.some_neurons(network)
    with frozen(engine, neurons, engine.optimizer) as freeze:
        train(engine, 2, 2)
    after = whole(network)
    experts_worker.assert_only_frozen_stayed(masters_before, masters(network))
    for name, mask in experts_worker.frozen_entries(before).items():
        assert torch.equal(before[name][mask], after[name][mask])
    unset_hf_deepspeed_config()
    alone = experts_worker.network()
    alone.load_state_dict(after, assign=True)
    assert freeze.digest() == Freeze(alone, experts_worker.some_neurons(alone)).digest()


def clipping_counts_free_gradients_only(_: Path, stage: int) -> None:
    from deepspeed.utils import safe_get_full_grad

    norms = []
    for with_freeze in (False, True):
        network = new_network()
        engine = engine_of(network, stage)
        if with_freeze:
            Freeze(engine, some_neurons(engine)).attach(engine.optimizer)
        engine.backward(loss_of(engine, 0))
        gradients = {n: safe_get_full_grad(p).double() for n, p in network.named_parameters()}
        engine.step()
        masks = frozen_entries(gradients)
        free = sum(float(g[~masks[name]].square().sum()) for name, g in gradients.items()) ** 0.5
        everything = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        norms.append((free, everything, float(engine.get_global_grad_norm())))
    (free, everything, seen), (_, _, seen_frozen) = norms
    assert everything > 1.001 * free
    assert abs(seen / everything - 1) < 1e-4
    assert abs(seen_frozen / free - 1) < 1e-4


def a_drifting_master_is_seen(_: Path, stage: int) -> None:
    """A change too small for the bfloat16 weights is a change all the same."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    network = new_network()
    engine = engine_of(network, stage, bf16=True)
    freeze = Freeze(engine, some_neurons(engine))
    weights = whole(network)
    parameter = network.get_decoder().layers[2].mlp.up_proj.weight
    value = safe_get_full_fp32_param(parameter).clone()
    value[3, 0] *= 1 + 2**-20
    safe_set_full_fp32_param(parameter, value)
    assert all(torch.equal(weights[name], now) for name, now in whole(network).items())
    assert freeze.changed() == ["model.layers.2.mlp.up_proj.weight"]
    freeze.restore()
    assert freeze.changed() == []


def masters_out_of_reach_are_refused(_: Path) -> None:
    network = new_network()
    engine = engine_of(network, 0, bf16=True)
    freeze = Freeze(engine, some_neurons(engine))
    refused(InputError, "stage 1, 2 or 3", lambda: freeze.attach(engine.optimizer))


def freezing_before_initialising_is_refused(_: Path) -> None:
    network = new_network()
    freeze = Freeze(network, some_neurons(network))
    engine = engine_of(network, 3)
    refused(RuntimeError, "freeze them when it has been", lambda: freeze.attach(engine.optimizer))


def trained_and_resumed(folder: Path, stage: int, **changes: object) -> None:
    """With transformers' trainer, from weights that ZeRO-3 shares out while it reads them."""
    given = new_network().bfloat16()
    before, neurons = snapshot(given), some_neurons(given)
    given.save_pretrained(folder / "given")
    for steps, checkpoint in ((2, None), (4, str(folder / "checkpoint-2"))):
        # The arguments come first: as long as they are there, transformers loads weights for ZeRO-3.
        settings = arguments(TrainingArguments, folder, **changes)
        network = AutoModelForCausalLM.from_pretrained(folder / "given", dtype="bfloat16")
        callback = FreezeNeurons(neurons)
        trainer = plain_trainer(network, folder, [callback], max_steps=steps, optim="adamw_torch", **changes)
        assert settings.deepspeed_plugin.zero_stage == stage
        trainer.train(resume_from_checkpoint=checkpoint)
        assert type(trainer.optimizer.optimizer).__name__.startswith("DeepSpeedZeroOptimizer")
        assert ("ds_id" in vars(next(trainer.model.parameters()))) == (stage == 3)
        callback.freeze.verify()
        saved = load_file(folder / f"checkpoint-{steps}" / "model.safetensors")
        assert_only_frozen_stayed(before, saved, every_entry=False)


def dpo_trained(folder: Path, **changes: object) -> None:
    network = new_network().bfloat16()
    before, callback = snapshot(network), FreezeNeurons(some_neurons(network))
    trainer = dpo_trainer(network, folder, [callback], optim="adamw_torch", **changes)
    trainer.train()
    assert_only_frozen_stayed(before, whole(trainer.model), every_entry=False)


def matrix() -> dict[str, Callable[[Path], None]]:
    anatomies = cycle(("uneven", "biases", "fused"))
    return {
        f"ZeRO-{stage}, {'bf16' if bf16 else 'fp32'}, {'clipped' if clip else 'unclipped'}, {parts} parts": partial(
            loop, stage=stage, bf16=bf16, clip=clip, parts=parts, anatomy=next(anatomies)
        )
        for stage, bf16, clip, parts in product((1, 2, 3), (False, True), (False, True), (1, 2))
    }


SOME = {"anatomy": "uneven", "bf16": True, "clip": True, "parts": 2}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, Callable[[Path], None]] = {
    **matrix(),
    **{f"experts, ZeRO-{stage}": partial(experts, stage=stage, bf16=stage > 1) for stage in (1, 2, 3)},
    "ZeRO-0, which is DDP": partial(loop, stage=0, **{**SOME, "bf16": False}),
    "ZeRO-1 with float32 gradients": partial(loop, stage=1, kind="BF16", grad_accum_dtype="fp32", **SOME),
    "ZeRO-2, masters on the CPU": partial(loop, stage=2, **SOME, **OFFLOAD),
    "ZeRO-3, masters on the CPU": partial(loop, stage=3, **SOME, **OFFLOAD),
    **{
        f"{case.__name__}, ZeRO-{stage}": partial(case, stage=stage)
        for case in (clipping_counts_free_gradients_only, a_drifting_master_is_seen)
        for stage in (1, 2, 3)
    },
    "masters_out_of_reach_are_refused": masters_out_of_reach_are_refused,
    "freezing_before_initialising_is_refused": freezing_before_initialising_is_refused,
    "transformers' trainer, ZeRO-3 of accelerate": partial(
        with_shipped_config, name="eight_gpus_zero3.yaml", train_it=trained_and_resumed, stage=3
    ),
    "DPO, ZeRO-3 of accelerate": partial(with_shipped_config, name="eight_gpus_zero3.yaml", train_it=dpo_trained),
}


if __name__ == "__main__":
    run({name: CASES[name] for name in sys.argv[2:] or CASES}, Path(sys.argv[1]))
