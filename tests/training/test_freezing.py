"""Frozen neurons stay bit for bit while every other weight moves, in any trainer, and the proof notices one bit."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import compile_regions
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from safeneuron.errors import InputError
from safeneuron.neurons.layout import fingerprint, widths_of
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from tests.helpers import tiny
from tests.helpers.frozen_checks import (
    assert_only_frozen_stayed,
    frozen_entries,
    network_with_noise,
    snapshot,
    some_neurons,
)
from tests.helpers.tiny_trainers import dpo_trainer, plain_trainer, sft_trainer

ANATOMIES = [*((family, {}) for family in tiny.CONFIGS), ("llama", {"mlp_bias": True, "attention_bias": True})]
MODES = ["plain", "gradient checkpointing", "bfloat16 autocast"]


def hooks_on(network: nn.Module) -> int:
    """How many hooks of any kind the modules and the parameters carry, but for gradient checkpointing's own."""
    network.disable_input_require_grads()
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    count = sum(len(vars(module)[kind]) for module in network.modules() for kind in kinds)
    for parameter in network.parameters():
        count += len(parameter._post_accumulate_grad_hooks or ()) + len(parameter._backward_hooks or ())
    return count


def loss_of(network: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(seed))
    return network(input_ids=ids, labels=ids).loss


def adamw(network: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=weight_decay)


def train(
    network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 2, mode: str = "plain"
) -> None:
    for step in range(steps):
        for part in range(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bfloat16 autocast"):
                loss = loss_of(network, 10 * step + part) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


# -- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "changes"), ANATOMIES, ids=[*tiny.CONFIGS, "llama with biases"])
def test_frozen_entries_stay_and_all_others_move(family, changes, mode):
    network = network_with_noise(family, **changes)
    if mode == "gradient checkpointing":
        network.gradient_checkpointing_enable()
    optimizer = adamw(network)
    train(network, optimizer, steps=2, mode=mode)  # The freeze begins with momentum in the optimizer.
    before = snapshot(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=3, mode=mode)
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["fused", "foreach", "momentum", "adafactor"],
)
def test_any_optimizer(make):
    network = network_with_noise()
    optimizer = make(network.parameters())
    train(network, optimizer, steps=2)
    before = snapshot(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=3)
    assert_only_frozen_stayed(before, network)


def test_model_in_bfloat16():
    network = network_with_noise().to(torch.bfloat16)
    optimizer = adamw(network)
    before, masks = snapshot(network), frozen_entries(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=3)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.detach()[masks[name]], before[name][masks[name]])
        assert not torch.equal(parameter.detach(), before[name])


@pytest.mark.parametrize(("weight_decay", "warm_steps"), [(0.1, 0), (0.0, 2)], ids=["weight decay", "momentum"])
def test_a_mask_alone_would_drift(weight_decay, warm_steps, monkeypatch):
    network = network_with_noise()
    optimizer = adamw(network, weight_decay)
    train(network, optimizer, warm_steps)
    monkeypatch.setattr(Freeze, "restore", lambda self: None)
    block = frozen(network, some_neurons(network), optimizer)
    with pytest.raises(RuntimeError, match="frozen slices have changed"), block:
        train(network, optimizer, steps=2)


def test_a_mask_alone_is_enough_without_weight_decay_and_momentum(monkeypatch):
    """The mask does its part: what remains for the restore is only what the optimizer adds."""
    network = network_with_noise()
    optimizer = adamw(network, weight_decay=0.0)
    monkeypatch.setattr(Freeze, "restore", lambda self: None)
    with frozen(network, some_neurons(network), optimizer) as freeze:
        train(network, optimizer, steps=2)
    assert freeze.changed() == []


def test_clipping_counts_free_gradients_only():
    network, optimizer = network_with_noise(), None
    loss_of(network, 0).backward()
    masks = frozen_entries(network)
    gradients = {name: parameter.grad.double() for name, parameter in network.named_parameters()}
    free = sum(float(g[~masks[name]].square().sum()) for name, g in gradients.items()) ** 0.5
    everything = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    assert everything > 1.001 * free
    network.zero_grad()
    optimizer = adamw(network)
    with frozen(network, some_neurons(network), optimizer):
        loss_of(network, 0).backward()
        assert float(nn.utils.clip_grad_norm_(network.parameters(), 0.5)) == pytest.approx(free, rel=1e-5)


def test_gradients_that_are_not_numbers_cannot_reach_frozen_neurons():
    network = network_with_noise()
    optimizer = adamw(network)
    before, masks = snapshot(network), frozen_entries(network)
    with frozen(network, some_neurons(network), optimizer):
        (loss_of(network, 0) * float("nan")).backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.detach()[masks[name]], before[name][masks[name]])
    assert network.lm_head.weight.isnan().any()


# -- hand-written loops -----------------------------------------------------------------------------------------


def test_several_optimizers():
    network = network_with_noise()
    before = snapshot(network)
    parameters = list(network.parameters())
    optimizers = [torch.optim.AdamW(parameters[:9], lr=1e-2), torch.optim.AdamW(parameters[9:], lr=1e-2)]
    with frozen(network, some_neurons(network), *optimizers):
        for step in range(3):
            loss_of(network, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_only_frozen_stayed(before, network)
    assert not any(each._optimizer_step_post_hooks or each._optimizer_step_pre_hooks for each in optimizers)


def test_optimizer_that_computes_the_loss_itself():
    """LBFGS evaluates the loss many times in one step; the hooks around the step see only its beginning and end."""
    network = network_with_noise()
    before = snapshot(network)
    optimizer = torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(network, 0)
        loss.backward()
        return loss

    with frozen(network, some_neurons(network), optimizer) as freeze:
        for _ in range(2):
            optimizer.step(closure)
            assert freeze.changed() == []
    assert_only_frozen_stayed(before, network, every_entry=False)


def test_step_without_a_backward_pass():
    network = network_with_noise()
    optimizer = adamw(network)
    before = snapshot(network)
    with frozen(network, some_neurons(network), optimizer):
        optimizer.step()
        assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
        train(network, optimizer, steps=2)
        optimizer.step()
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize("fused", [False, True], ids=["step not called", "step called with a flag"])
def test_loss_scaling_that_skips_a_step(fused):
    """float16 as on a GPU: gradients that overflow are thrown away, by not stepping or, if fused, inside the step."""
    network = network_with_noise()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    before, skipped = snapshot(network), []
    with frozen(network, some_neurons(network), optimizer):
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(network, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped.append(all(torch.equal(value, before[name]) for name, value in network.named_parameters()))
    assert skipped == [True, False, False, False]
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize("compiler", ["whole", "layer by layer", "in place"])
def test_compiled_network(compiler):
    network = network_with_noise()
    neurons, before = some_neurons(network), snapshot(network)
    # The graphs are the compiled ones; only the code generator, which takes a minute, is left out.
    if compiler == "whole":
        compiled = torch.compile(network, backend="aot_eager")
    elif compiler == "layer by layer":
        compiled = compile_regions(network, backend="aot_eager")
    else:
        network.compile(backend="aot_eager")
        compiled = network
    loss_of(compiled, 0).backward()  # The graph, with its backward pass, is there before the hooks are.
    optimizer = adamw(network)
    optimizer.zero_grad()
    with frozen(compiled, neurons, optimizer):
        train(compiled, optimizer, steps=3)
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize("kind", ["moving average", "plain average"])
def test_averages_of_torch_are_exact(kind):
    network = network_with_noise()
    before, optimizer = snapshot(network), adamw(network)
    rule = get_ema_multi_avg_fn(0.9) if kind == "moving average" else None
    average = AveragedModel(network, multi_avg_fn=rule)
    with frozen(network, some_neurons(network), optimizer):
        for _ in range(3):
            train(network, optimizer, steps=1)
            average.update_parameters(network)
    assert_only_frozen_stayed(before, average.module)


# -- trainers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("make", [plain_trainer, sft_trainer, dpo_trainer])
def test_one_line_in_any_trainer(make, family, tmp_path):
    network = network_with_noise(family)
    before, hooks, known_as = snapshot(network), hooks_on(network), fingerprint(network)
    callback = FreezeNeurons(some_neurons(network))
    trainer = make(network, tmp_path, [callback])
    trainer.train()
    assert trainer.state.global_step == 4
    assert_only_frozen_stayed(before, network)
    callback.freeze.verify()
    assert hooks_on(network) == hooks
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert fingerprint(network) == known_as
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, mask in frozen_entries(network).items():
        if mask.any():
            assert torch.equal(saved[name][mask], before[name][mask])
            assert not torch.equal(saved[name], before[name])


class Once(TrainerCallback):
    """Do something to the model when training begins, the first time."""

    def __init__(self, action):
        self.action = action

    def on_train_begin(self, args, state, control, model=None, **_):
        action, self.action = self.action, lambda model: None
        action(model)


class StopAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def replace_parameter(network: nn.Module) -> None:
    projection = network.get_decoder().layers[2].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().clone())


def test_trainer_that_replaces_parameters_is_an_error(tmp_path):
    network = network_with_noise()
    callback = FreezeNeurons(some_neurons(network))
    trainer = plain_trainer(network, tmp_path, [callback, Once(replace_parameter)])
    with pytest.raises(RuntimeError, match=r"layers\.2\.mlp\.up_proj\.weight.*cannot be frozen exactly"):
        trainer.train()


def test_trainer_that_changes_frozen_weights_cannot_save_them(tmp_path):
    network = network_with_noise()
    callback = FreezeNeurons(some_neurons(network))
    trainer = plain_trainer(network, tmp_path, [callback])
    # A change after the last restore, as a trainer makes that averages weights or steps on its own.
    trainer.add_callback(Damage(network))
    with pytest.raises(RuntimeError, match="have changed"):
        trainer.train()
    assert trainer.state.global_step == 2  # At the first save, not only at the end.


class Damage(TrainerCallback):
    def __init__(self, network):
        self.network = network

    def on_step_end(self, args, state, control, **_):
        with torch.no_grad():
            self.network.get_decoder().layers[0].mlp.down_proj.weight[0, 7] += 1.0


def test_training_after_a_crash_with_the_same_callback(tmp_path):
    network = network_with_noise()
    hooks = hooks_on(network)
    callback = FreezeNeurons(some_neurons(network))
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(network, tmp_path / "a", [callback, StopAtStep()]).train()
    assert hooks_on(network) > hooks
    before = snapshot(network)
    plain_trainer(network, tmp_path / "b", [callback]).train()
    assert_only_frozen_stayed(before, network)
    assert hooks_on(network) == hooks


def test_close_takes_the_hooks_away_after_a_crash(tmp_path):
    network = network_with_noise()
    hooks = hooks_on(network)
    callback = FreezeNeurons(some_neurons(network))
    callback.close()  # Before training there is nothing to close.
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(network, tmp_path, [callback, StopAtStep()]).train()
    callback.close()
    assert hooks_on(network) == hooks


# -- what is refused --------------------------------------------------------------------------------------------


def test_neurons_of_another_model_are_refused(tmp_path):
    network, other = network_with_noise(), tiny.network(seed=1)
    hooks = hooks_on(network)
    with pytest.raises(InputError, match="another model"):
        Freeze(network, some_neurons(other))
    with pytest.raises(InputError, match="another model"):
        plain_trainer(network, tmp_path, [FreezeNeurons(some_neurons(other))]).train()
    wider = tiny.network(intermediate_size=64)
    with pytest.raises(InputError, match="layers"):
        Freeze(network, some_neurons(wider))
    assert hooks_on(network) == hooks


def test_replaced_parameter_is_an_error_in_a_hand_written_loop():
    network = network_with_noise()
    optimizer = adamw(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=1)
        replace_parameter(network)
        with pytest.raises(RuntimeError, match="cannot be frozen exactly"):
            train(network, optimizer, steps=1)
    assert hooks_on(network) == 0


def test_replaced_gradient_is_an_error():
    """DeepSpeed and its like write gradients on their own, past the hooks."""
    network = network_with_noise()
    optimizer = adamw(network)
    before = snapshot(network)
    with frozen(network, some_neurons(network), optimizer):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(RuntimeError, match="were not masked"):
            optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def test_parameter_that_is_trained_only_later_is_an_error():
    network = network_with_noise()
    weight = network.get_decoder().layers[0].mlp.gate_proj.weight.requires_grad_(False)
    optimizer = adamw(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=1)
        weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.gate_proj.*cannot be frozen exactly"):
            train(network, optimizer, steps=1)


def tie_two_layers(network: nn.Module) -> None:
    layers = network.get_decoder().layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def tie_to_something_else(network: nn.Module) -> None:
    network.register_parameter("also", network.get_decoder().layers[1].mlp.down_proj.weight)


def share_a_module(network: nn.Module) -> None:
    layers = network.get_decoder().layers
    layers[2].mlp = layers[1].mlp


@pytest.mark.parametrize(
    ("tie", "found"),
    [
        (tie_two_layers, r"model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.2\.mlp\.up_proj\.weight are one"),
        (tie_to_something_else, r"also and model\.layers\.1\.mlp\.down_proj\.weight are one parameter"),
        (share_a_module, r"layers 1 and 2 of LlamaModel share one FFN"),
    ],
)
def test_tied_weights_are_refused(tie, found, tmp_path):
    network = network_with_noise()
    neurons = some_neurons(network)
    tie(network)
    optimizer = adamw(network)
    with pytest.raises(InputError, match=found):
        Freeze(network, neurons)
    with pytest.raises(InputError, match=found), frozen(network, neurons, optimizer):
        pass
    with pytest.raises(InputError, match=found):
        plain_trainer(network, tmp_path, [FreezeNeurons(neurons)]).train()


def test_tied_embeddings_are_no_obstacle():
    network = network_with_noise(tie_word_embeddings=True)
    optimizer = adamw(network)
    before = snapshot(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=2)
    assert_only_frozen_stayed(before, network)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    network = network_with_noise()
    neurons = some_neurons(network)
    projection = network.get_decoder().layers[1].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"quantised \(model\.layers\.1\.mlp\.up_proj\.weight is {kind}\).*LoRA"):
        Freeze(network, neurons)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_weights_quantised_by_bitsandbytes_are_refused(kind):
    modules = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    network = network_with_noise()
    neurons = some_neurons(network)
    for layer in network.get_decoder().layers:
        for name, projection in list(layer.mlp.named_children()):
            if isinstance(projection, nn.Linear):
                sizes = (projection.in_features, projection.out_features)
                four = modules.Linear4bit(*sizes, bias=False)
                eight = modules.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                quantised = four if kind == "Linear4bit" else eight
                quantised.load_state_dict(projection.state_dict())
                layer.mlp.add_module(name, quantised.to("cpu"))
    with pytest.raises(InputError, match=r"quantised \(model\.layers\.0\.mlp\.\w+\.weight is u?int8\).*LoRA"):
        Freeze(network, neurons)


WHOLE = {0: range(tiny.WIDTH), 2: [3]}
EVERYTHING = dict.fromkeys(range(tiny.LAYERS), range(tiny.WIDTH))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (WHOLE, "every neuron of layer 0,"),
        ({**WHOLE, 1: range(tiny.WIDTH)}, "layers 0, 1,"),
        (EVERYTHING, "all layers,"),
    ],
)
def test_sets_that_leave_no_neuron_free_are_refused(layers, found, tmp_path):
    network = network_with_noise()
    neurons = NeuronSet.of(layers, widths_of(network), fingerprint(network))
    with pytest.raises(InputError, match=f"{found}.*smaller density.*whole_layers=True"):
        Freeze(network, neurons)
    with pytest.raises(InputError, match=found), frozen(network, neurons, adamw(network)):
        pass
    with pytest.raises(InputError, match=found):
        plain_trainer(network, tmp_path, [FreezeNeurons(neurons)]).train()
    assert hooks_on(network) == 0


def test_whole_layers_can_be_frozen_where_that_is_meant(tmp_path):
    network = network_with_noise()
    neurons = NeuronSet.of(EVERYTHING, widths_of(network), fingerprint(network))
    before, optimizer = snapshot(network), adamw(network)
    with frozen(network, neurons, optimizer, whole_layers=True):
        train(network, optimizer, steps=2)
    plain_trainer(network, tmp_path, [FreezeNeurons(neurons, whole_layers=True)]).train()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (".mlp." in name), name


def test_parameters_without_gradient_are_no_error():
    network = network_with_noise()
    network.get_decoder().layers[0].mlp.gate_proj.weight.requires_grad_(False)
    optimizer = adamw(network)
    with frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=1)


def test_wrong_optimizer_is_noticed():
    network = network_with_noise()
    optimizer = adamw(network)
    with pytest.raises(RuntimeError, match="have changed"), frozen(network, some_neurons(network), adamw(network)):
        train(network, optimizer, steps=1)


def test_nothing_is_left_behind_also_after_an_exception():
    network = network_with_noise()
    optimizer = adamw(network)
    with pytest.raises(ZeroDivisionError), frozen(network, some_neurons(network), optimizer):
        train(network, optimizer, steps=1 // (hooks_on(network) - hooks_on(network)))
    assert hooks_on(network) == 0
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    before = snapshot(network)
    train(network, optimizer, steps=1)
    # What was frozen is free again.
    assert all((parameter != before[name]).all() for name, parameter in network.named_parameters())


# -- the proof --------------------------------------------------------------------------------------------------


def flip(values: Tensor, bit: int) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return (values.view(integer) ^ torch.tensor(1 << bit, dtype=integer)).view(values.dtype)


CHANGES = {
    "lowest bit": (1.0, lambda x: flip(x, 0)),
    "sign of zero": (0.0, lambda x: -x),
    "to not-a-number": (1.0, lambda x: x * float("nan")),
    "payload of not-a-number": (float("nan"), lambda x: flip(x, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_bit_is_seen(change, where, dtype):
    start, damage = CHANGES[change]
    network = network_with_noise().to(dtype)
    weight = vars(network.get_decoder().layers[2].mlp)["_modules"][where].weight.data
    entry = (5, 3) if where == "down_proj" else (3, 5)
    weight[entry] = start
    freeze = Freeze(network, some_neurons(network))
    digest = freeze.digest()
    freeze.verify()
    weight[entry] = damage(weight[entry])
    assert freeze.changed() == [f"model.layers.2.mlp.{where}.weight"]
    assert freeze.digest() != digest
    with pytest.raises(RuntimeError, match=where):
        freeze.verify()
    freeze.restore()
    freeze.verify()
    assert freeze.digest() == digest


def test_changes_elsewhere_are_none_of_its_business():
    network = network_with_noise("phi3", mlp_bias=True)
    freeze = Freeze(network, some_neurons(network))
    digest = freeze.digest()
    with torch.no_grad():
        for name, mask in frozen_entries(network).items():
            parameter = network.get_parameter(name)
            parameter[~mask] += 1.0
    freeze.verify()
    assert freeze.digest() == digest


def test_the_proof_looks_at_the_model_as_it_is_now():
    """Not at the parameter objects of the past: a replaced one must not hide a change."""
    network = network_with_noise()
    freeze = Freeze(network, some_neurons(network))
    replace_parameter(network)
    freeze.verify()
    with torch.no_grad():
        network.get_decoder().layers[2].mlp.up_proj.weight[3, 0] += 1.0
    assert freeze.changed() == ["model.layers.2.mlp.up_proj.weight"]


def test_a_wider_precision_is_no_change_but_a_lossy_one_is():
    network = network_with_noise().to(torch.bfloat16)
    freeze = Freeze(network, some_neurons(network))
    network.float()
    freeze.verify()
    with torch.no_grad():
        network.get_decoder().layers[2].mlp.up_proj.weight[3, 0] *= 1 + 2**-20
    assert freeze.changed() == ["model.layers.2.mlp.up_proj.weight"]
    exact = Freeze(network, some_neurons(network))
    network.to(torch.bfloat16)
    assert exact.changed() == ["model.layers.2.mlp.up_proj.weight"]


def test_no_neurons_freeze_nothing():
    network = network_with_noise()
    optimizer = adamw(network)
    before = snapshot(network)
    with frozen(network, NeuronSet.of({}, widths_of(network), fingerprint(network)), optimizer) as freeze:
        train(network, optimizer, steps=1)
    assert freeze.slices == []
    assert all((parameter != before[name]).all() for name, parameter in network.named_parameters())
