"""Alignment: TRL's DPO held against the formula, the given model untouched, the freeze proved, resumption exact."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from safeneuron.data.types import Pair
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.layout import LINEAGE
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.training import alignment
from safeneuron.training.ablation import Ablation
from safeneuron.training.alignment import Alignment, align
from safeneuron.training.dpo import dataset_of
from safeneuron.training.freezing import Freeze
from safeneuron.training.settings import COMPLETE, TrainingSettings
from tests import rarely
from tests.helpers import tiny
from tests.helpers.frozen_checks import assert_only_frozen_stayed, frozen_entries, snapshot, some_neurons
from tests.training.test_freezing import hooks_on

LN2 = math.log(2)
REFUSALS = ["I cannot help.", "No.", "Sorry, no way."]
PAIRS = [
    Pair(({"role": "user", "content": f"question {number}"},), REFUSALS[number % 3], f"Sure, step {number * 7}", "test")
    for number in range(8)
]


def run(model: Model, frozen: NeuronSet | None = None, **changes: object) -> Alignment:
    settings = {
        "learning_rate": 1e-2,
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_share": 0.0,
        "max_length": 64,
        "precision": "float32",
        **changes,
    }
    apart = {name: settings.pop(name) for name in ("checkpoints", "progress") if name in settings}
    ablated, share = settings.pop("ablated", None), settings.pop("ablate_share", 1.0)
    reference = settings.pop("ablate_reference", False)
    ablation = Ablation(ablated, share, reference) if ablated is not None else None
    return align(model, PAIRS, frozen, TrainingSettings(**settings), ablation=ablation, **apart)


def chosen_neurons(model: Model) -> NeuronSet:
    return some_neurons(model.network)


def many_neurons(model: Model) -> NeuronSet:
    """Half of every layer: to prune them changes every answer."""
    half = range(0, tiny.WIDTH, 2)
    return NeuronSet.of(dict.fromkeys(range(tiny.LAYERS), half), model.widths, model.fingerprint)


def state_of(network: nn.Module) -> dict[str, object]:
    """Everything that a trainer could leave on a model."""
    return {
        "weights": {name: value.clone() for name, value in network.named_parameters()},
        "buffers": {name: value.clone() for name, value in network.named_buffers()},
        "attributes": set(vars(network)),
        "config": copy.deepcopy(vars(network.config)),
        "generation": copy.deepcopy(vars(network.generation_config)),
        "hooks": hooks_on(network),
        "training": [module.training for module in network.modules()],
        "gradients": [parameter.grad for parameter in network.parameters()],
        "trainable": [parameter.requires_grad for parameter in network.parameters()],
        "checkpointing": network.is_gradient_checkpointing,
    }


def assert_same_state(first: dict[str, object], second: dict[str, object], but: tuple[str, ...] = ()) -> None:
    for kind in ("weights", "buffers"):
        if kind not in but:
            assert_same_tensors(first[kind], second[kind])
    for kind in first.keys() - {"weights", "buffers", *but}:
        assert first[kind] == second[kind], kind


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def assert_frozen_alone(before: Model, after: Model) -> None:
    """Bit for bit the same where the chosen neurons are, and something else elsewhere in the same parameters."""
    for name, mask in frozen_entries(snapshot(before.network)).items():
        if mask.any():
            old, new = before.network.get_parameter(name), after.network.get_parameter(name)
            assert torch.equal(old[mask], new[mask]), name
            assert not torch.equal(old[~mask], new[~mask]), name


def log_probability(model: Model, pair: Pair, answer: str) -> Tensor:
    """Of the answer with its end token, given the prompt; token by token, one sequence at a time."""
    prompt = model.encode(pair.prompt)
    whole = [*prompt, *model.tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        scores = model.network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(scores[place - 1, whole[place]] for place in range(len(prompt), len(whole)))


def dpo_loss(policy: Model, reference: Model, ablated: NeuronSet | None = None, beta: float = 0.1) -> float:
    """-log sigmoid(beta ((log p(w) - log r(w)) - (log p(l) - log r(l)))), mean over all pairs (Eq. 11)."""
    losses = []
    for pair in PAIRS:
        with pruned(policy, ablated):
            ours = log_probability(policy, pair, pair.chosen) - log_probability(policy, pair, pair.rejected)
        theirs = log_probability(reference, pair, pair.chosen) - log_probability(reference, pair, pair.rejected)
        losses.append(float(-nn.functional.logsigmoid(beta * (ours - theirs))))
    return sum(losses) / len(losses)


def interrupt_at(step: int, seen: list[int] | None = None):
    def progress(done: int, total: int) -> None:
        if seen is not None:
            seen.append(done)
        if done == step:
            raise KeyboardInterrupt

    return progress


# -- what is trained --------------------------------------------------------------------------------------------


def test_every_family_keeps_its_frozen_neurons_and_moves_the_rest(family):
    model = tiny.model(family)
    result = run(model, chosen_neurons(model))
    assert_frozen_alone(model, result.model)
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert result.frozen_identical
    assert result.frozen_count == 4
    assert result.frozen_sha256 == Freeze(result.model, chosen_neurons(model)).digest()
    assert result.steps == 2


def test_all_free_weights_move():
    model = tiny.model()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {name: value.detach().clone() for name, value in model.network.named_parameters()}
    result = run(model, chosen_neurons(model), weight_decay=0.1, epochs=2)
    assert_only_frozen_stayed(before, snapshot(result.model.network))


def test_losses_are_those_of_the_formula():
    model = tiny.model()
    one = run(model, epochs=1, batch_size=8, micro_batch_size=8)
    two = run(model, epochs=2, batch_size=8, micro_batch_size=4)
    assert [one.steps, two.steps] == [1, 2]
    assert one.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert dpo_loss(model, model) == pytest.approx(LN2)
    # The first step is the same in both, so the second loss is that of the first run's result.
    assert two.log[1]["loss"] == pytest.approx(dpo_loss(one.model, model), rel=1e-4)
    assert two.log[1]["loss"] < 0.5
    strong = run(model, epochs=2, batch_size=8, micro_batch_size=8, beta=0.3)
    once = run(model, epochs=1, batch_size=8, micro_batch_size=8, beta=0.3)
    assert strong.log[1]["loss"] == pytest.approx(dpo_loss(once.model, model, beta=0.3), rel=1e-4)


def test_likelihood_of_the_chosen_answers_is_added():
    model = tiny.model()
    tokens = sum(len(model.tokenizer(pair.chosen + "<|end|>")["input_ids"]) for pair in PAIRS)
    surprise = -sum(float(log_probability(model, pair, pair.chosen)) for pair in PAIRS) / tokens
    result = run(model, batch_size=8, micro_batch_size=8, sft_weight=0.5)
    assert result.log[0]["loss"] == pytest.approx(LN2 + 0.5 * surprise, rel=1e-5)


def test_bfloat16_autocast_and_gradient_checkpointing():
    model = tiny.model()
    result = run(model, chosen_neurons(model), precision="bfloat16", gradient_checkpointing=True)
    exact = run(model, chosen_neurons(model))
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=2e-3)
    assert result.model.network.dtype == torch.float32
    assert result.log[1]["loss"] == pytest.approx(exact.log[1]["loss"], rel=0.1)
    assert result.log[1]["loss"] != exact.log[1]["loss"]


def test_gradient_checkpointing_changes_nothing():
    model = tiny.model()
    plain = run(model, chosen_neurons(model), ablated=many_neurons(model))
    saving = run(model, chosen_neurons(model), ablated=many_neurons(model), gradient_checkpointing=True)
    assert_same_tensors(dict(plain.model.network.named_parameters()), dict(saving.model.network.named_parameters()))


@pytest.mark.parametrize("kind", ["none", "random"])
def test_baselines(kind):
    model = tiny.model()
    control = chosen_neurons(model).random_like(0, avoid=chosen_neurons(model))
    result = run(model, control if kind == "random" else None)
    assert result.frozen_count == (4 if kind == "random" else 0)
    assert result.frozen_identical
    assert (result.frozen_sha256 == "") == (kind == "none")
    assert result.model.fingerprint == model.fingerprint
    freeze = Freeze(copy.deepcopy(model.network), control)
    freeze.network.load_state_dict(result.model.network.state_dict())
    assert (freeze.changed() == []) == (kind == "random")


def test_free_change_is_that_of_the_free_weights_alone():
    model = tiny.model()
    result = run(model, chosen_neurons(model))
    change = size = 0.0
    for name, mask in frozen_entries(snapshot(model.network)).items():
        before = model.network.get_parameter(name).detach().double()[~mask]
        after = result.model.network.get_parameter(name).detach().double()[~mask]
        change += float(((after - before) ** 2).sum())
        size += float((before**2).sum())
    assert result.free_change == pytest.approx(math.sqrt(change / size), rel=1e-5)


def test_progress_and_log():
    model = tiny.model()
    calls = []
    result = run(model, epochs=1.5, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [entry["step"] for entry in result.log] == [1, 2, 3]
    assert result.log[0]["learning_rate"] == pytest.approx(1e-2)
    assert all(entry["grad_norm"] > 0 for entry in result.log)
    assert result.log[2]["accuracy"] == 1.0
    assert result.log[2]["margin"] > 0


def test_the_end_of_the_answer_is_trained_on_though_padding_is_the_same_token(tmp_path):
    model = tiny.model()
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    trainer = DPOTrainer(
        model=copy.deepcopy(model.network),
        ref_model=copy.deepcopy(model.network),
        args=DPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=dataset_of(PAIRS),
        processing_class=model.tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    rows = list(zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True))
    trained = [model.tokenizer.decode(ids[mask.bool()]) for ids, mask, _ in rows]
    assert sorted(trained[:8]) == sorted(pair.chosen + "<|end|>" for pair in PAIRS)
    assert sorted(trained[8:]) == sorted(pair.rejected + "<|end|>" for pair in PAIRS)
    padded = [ids[(1 - seen).bool()] for ids, _, seen in rows]
    assert sum(map(len, padded)) > 0
    assert all((padding == model.tokenizer.eos_token_id).all() for padding in padded)


# -- the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finished", "interrupted"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_given_model_is_not_touched(dtype, precision, end, tmp_path):
    tiny.model().save(tmp_path)
    model = load(tmp_path, dtype=dtype, device="cpu")
    before = state_of(model.network)
    settings = {"precision": precision, "gradient_checkpointing": True, "ablated": many_neurons(model)}
    if end == "finished":
        run(model, chosen_neurons(model), **settings)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(model, chosen_neurons(model), progress=interrupt_at(1), **settings)
    assert_same_state(before, state_of(model.network))
    assert "forward" not in vars(model.network)


def test_the_reference_is_the_model_in_memory_not_the_one_it_was_loaded_from(tmp_path):
    tiny.model().save(tmp_path)
    stored, model = load(tmp_path, dtype="float32", device="cpu"), load(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert Path(model.network.config._name_or_path) == tmp_path
    assert abs(dpo_loss(model, stored) - LN2) > 0.01
    assert run(model).log[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_second_round_starts_from_the_first():
    """Its reference is the first round's result, and its frozen neurons may be named on the base model."""
    base = tiny.model()
    first = run(base, chosen_neurons(base), precision="bfloat16", gradient_checkpointing=True).model
    second = run(first, many_neurons(base), precision="bfloat16")
    assert second.log[0]["loss"] == pytest.approx(LN2, abs=2e-3)
    assert second.model.fingerprint == base.fingerprint
    exact = run(first, many_neurons(base))
    assert exact.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert exact.log[1]["loss"] != second.log[1]["loss"], "bfloat16 is still used in a second round"


# -- ablation ---------------------------------------------------------------------------------------------------


def test_only_the_policy_is_ablated():
    model = tiny.model()
    ablated = many_neurons(model)
    expected = dpo_loss(model, model, ablated)
    assert abs(expected - LN2) > 0.01
    result = run(model, ablated=ablated, epochs=1, batch_size=8, micro_batch_size=8)
    assert result.log[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_reference_too_is_ablated_if_asked_for():
    model = tiny.model()
    result = run(model, ablated=many_neurons(model), ablate_reference=True, batch_size=8, micro_batch_size=8)
    assert result.log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    intact = run(model, batch_size=8, micro_batch_size=8)
    assert result.log[0]["grad_norm"] != pytest.approx(intact.log[0]["grad_norm"], rel=1e-3)


def test_ablated_share_of_the_steps():
    model = tiny.model()
    every_second = run(model, ablated=many_neurons(model), ablate_share=0.5)
    never = run(model, ablated=many_neurons(model), ablate_share=0.0)
    plain = run(model)
    assert every_second.log[0] == plain.log[0]
    assert every_second.log[1]["loss"] != plain.log[1]["loss"]
    assert never.log == plain.log


# -- resumption -------------------------------------------------------------------------------------------------


def resumable(model: Model, folder: Path | None, **changes: object) -> Alignment:
    """Eight steps over two epochs; a save after every second."""
    return run(
        model, chosen_neurons(model), ablated=many_neurons(model), ablate_share=0.5, epochs=2, batch_size=2,
        micro_batch_size=1, warmup_share=0.25, checkpoints=folder, save_every=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight() -> Alignment:
    """An uninterrupted run without checkpoints."""
    return resumable(tiny.model(), None)


def assert_same_result(first: Alignment, second: Alignment) -> None:
    assert_same_tensors(first.model.network.state_dict(), second.model.network.state_dict())
    assert first.log == second.log
    assert (first.steps, first.frozen_sha256, first.free_change) == (
        second.steps, second.frozen_sha256, second.free_change,
    )  # fmt: skip


@pytest.mark.parametrize("step", [rarely(1), 4, rarely(7)])
def test_interrupted_training_ends_as_if_it_had_not_been(step, straight, tmp_path):
    model, seen = tiny.model(), []
    with pytest.raises(KeyboardInterrupt):
        resumable(model, tmp_path, progress=interrupt_at(step))
    result = resumable(model, tmp_path, progress=interrupt_at(-1, seen))
    assert_same_result(result, straight)
    # The interruption comes before the save of its own step.
    assert seen == list(range((step - 1) // 2 * 2 + 1, 9))


def test_finished_training_repeats_what_follows_its_last_checkpoint_and_goes_no_further(straight, tmp_path):
    model, seen = tiny.model(), []
    resumable(model, tmp_path)
    assert_same_result(resumable(model, tmp_path, progress=interrupt_at(-1, seen)), straight)
    # The last step leaves no checkpoint: the trainer would go on from it with one step more.
    assert seen == [7, 8]


def test_torn_checkpoint_is_ignored(straight, tmp_path):
    model, seen = tiny.model(), []
    with pytest.raises(KeyboardInterrupt):
        resumable(model, tmp_path, progress=interrupt_at(5))
    (whole,) = tmp_path.glob("checkpoint-*")
    assert whole.name == "checkpoint-4"
    (whole / COMPLETE).unlink()
    (whole / "model.safetensors").write_bytes(b"torn")
    assert_same_result(resumable(model, tmp_path, progress=interrupt_at(-1, seen)), straight)
    assert seen == list(range(1, 9))


def test_torn_checkpoint_does_not_hide_a_whole_one(straight, tmp_path):
    model, seen = tiny.model(), []
    with pytest.raises(KeyboardInterrupt):
        resumable(model, tmp_path, progress=interrupt_at(5))
    torn = tmp_path / "checkpoint-10"
    torn.mkdir()
    assert_same_result(resumable(model, tmp_path, progress=interrupt_at(-1, seen)), straight)
    assert seen == [5, 6, 7, 8]
    assert not torn.exists()


def test_the_freeze_is_proved_before_a_checkpoint_is_called_whole(tmp_path, monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(Freeze, "restore", lambda self: None)
    with pytest.raises(RuntimeError, match="frozen slices have changed"):
        resumable(model, tmp_path)
    assert list(tmp_path.glob("checkpoint-*"))
    assert not list(tmp_path.glob(f"checkpoint-*/{COMPLETE}"))


# -- what is left behind ----------------------------------------------------------------------------------------


def test_the_new_model_is_as_clean_as_the_given_one():
    model = tiny.model()
    model.network.generation_config.eos_token_id = [5]
    result = run(
        model, chosen_neurons(model), ablated=many_neurons(model), precision="bfloat16", gradient_checkpointing=True
    ).model
    before, after = state_of(model.network), state_of(result.network)
    lineage = after["config"].pop(LINEAGE)
    assert lineage == model.fingerprint
    assert_same_state(before, after, but=("weights",))
    assert result.tokenizer is model.tokenizer
    assert result.network(torch.tensor([[5, 6]])).logits.shape == (1, 2, 260)


def test_no_hook_stays_after_an_exception_within_a_step(monkeypatch):
    """The policy is of no use then, but whoever still holds it must not find it pruned."""
    model, policies = tiny.model(), []

    class Spy(Freeze):
        def __init__(self, network: nn.Module, neurons: NeuronSet, *, whole_layers: bool = False) -> None:
            super().__init__(network, neurons, whole_layers=whole_layers)
            policies.append(network)

            def fail(module: nn.Module, inputs: object) -> None:
                if network.training:
                    ours.remove()
                    raise ZeroDivisionError

            ours = network.get_decoder().layers[1].register_forward_pre_hook(fail)

    monkeypatch.setattr(alignment, "Freeze", Spy)
    with pytest.raises(ZeroDivisionError) as caught:
        run(model, chosen_neurons(model), ablated=many_neurons(model), precision="bfloat16")
    assert caught.traceback, "held here, so that no garbage collection takes the hooks away"
    (policy,) = policies
    assert hooks_on(policy) == 0
    assert set(vars(policy)) == set(vars(model.network))


def test_no_folder_and_no_output_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = tiny.model()
    run(model, chosen_neurons(model), save_every=1)
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not [path for path in (tmp_path / "temporary").iterdir() if list(path.rglob("checkpoint*"))]
    assert capsys.readouterr().out == ""


# -- on the disk ------------------------------------------------------------------------------------------------


def test_saved_model_has_the_base_fingerprint(tmp_path):
    model = tiny.model()
    for number, frozen in enumerate((chosen_neurons(model), None)):
        result = run(model, frozen, learning_rate=1.0).model
        signs = [(m.network.model.layers[0].mlp.down_proj.weight > 0)[:16] for m in (model, result)]
        assert not torch.equal(*signs), "only a lineage can still know it"
        result.save(tmp_path / str(number))
        assert load(tmp_path / str(number), device="cpu").fingerprint == model.fingerprint


def test_bfloat16_checkpoint_keeps_its_frozen_weights_on_the_disk(tmp_path):
    base = tiny.model()
    base.network.to(torch.bfloat16)
    base.save(tmp_path / "base")
    given, model = load(tmp_path / "base", "bfloat16", "cpu"), load(tmp_path / "base", "float32", "cpu")
    assert model.stored_dtype == torch.bfloat16
    result = run(model, chosen_neurons(model))
    result.model.save(tmp_path / "aligned")
    aligned = load(tmp_path / "aligned", "bfloat16", "cpu")
    assert aligned.stored_dtype == torch.bfloat16
    assert_frozen_alone(given, aligned)
    wide = load(tmp_path / "aligned", "float32", "cpu")
    assert Freeze(wide, chosen_neurons(model)).digest() == result.frozen_sha256
    # In memory and from the disk it is the same model, rotary frequencies included.
    assert_same_state(state_of(result.model.network), state_of(aligned.network), but=("config", "attributes"))


def test_weights_that_the_checkpoint_cannot_hold_are_not_rounded():
    model = tiny.model()
    model.stored_dtype = torch.bfloat16
    result = run(model, chosen_neurons(model))
    assert result.model.network.dtype == result.model.stored_dtype == torch.float32
    assert_frozen_alone(model, result.model)
    assert result.frozen_sha256 == Freeze(result.model, chosen_neurons(model)).digest()


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-30}, "changed by 0 of their size after 2 steps"),
        ({"learning_rate": 1e30}, "diverged: (loss|grad_norm) is"),
        ({"learning_rate": 1e39, "epochs": 0.5}, "use a learning rate below"),
        ({"max_length": 5}, "none of the 8 prompts leaves room"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    model = tiny.model()
    before = state_of(model.network)
    with pytest.raises(InputError, match=message):
        run(model, chosen_neurons(model), **changes)
    assert_same_state(before, state_of(model.network))


def test_no_pairs():
    model = tiny.model()
    with pytest.raises(InputError, match="no preference pairs"):
        align(model, [], None)


def test_equal_answers_are_named_by_their_place():
    pairs = [*PAIRS[:2], Pair(PAIRS[2].prompt, "Maybe.", "Maybe.", "test.jsonl")]
    with pytest.raises(InputError, match=r"pair 3 of 3 \(from test\.jsonl\) has the same chosen and rejected answer"):
        align(tiny.model(), pairs, None)


def test_prompts_that_fill_the_context_are_told():
    model = tiny.model()
    long = Pair(({"role": "user", "content": "why " * 40},), "No.", "Yes.", "test")
    training = TrainingSettings(
        learning_rate=1e-2, epochs=1, batch_size=4, micro_batch_size=2, max_length=64, precision="float32"
    )
    result = align(model, [long, *PAIRS, long], None, training)
    assert result.warnings == ("2 of 10 pairs were not trained on: their prompt alone fills max_length = 64 tokens",)
    # The steps are those of the pairs that are left, and so is the training.
    alone = align(model, PAIRS, None, training)
    assert result.steps == alone.steps == 2
    assert result.log == alone.log
    assert alone.warnings == ()


def test_no_chat_template():
    model = tiny.model()
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        run(model)


def test_loss_that_is_not_a_number_is_never_saved(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.network.lm_head.weight[7, 7] = float("nan")
    with pytest.raises(InputError, match="loss is nan at step 1"):
        run(model, checkpoints=tmp_path, save_every=1)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_gradient_that_is_not_a_number_is_never_saved(tmp_path, monkeypatch):
    """The loss is still fine in that step, but the weights are lost with it."""
    model = tiny.model()

    class Damage(Freeze):
        def __init__(self, network: nn.Module, neurons: NeuronSet, *, whole_layers: bool = False) -> None:
            super().__init__(network, neurons, whole_layers=whole_layers)
            network.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(alignment, "Freeze", Damage)
    with pytest.raises(InputError, match="grad_norm is nan at step 1"):
        run(model, chosen_neurons(model), checkpoints=tmp_path, save_every=1)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("role", ["frozen", "ablated"])
def test_neurons_of_another_model(role):
    model, other = tiny.model(), tiny.model(seed=1)
    called = []
    with pytest.raises(InputError, match="another model"):
        run(model, progress=lambda *step: called.append(step), ablate_share=0.5, **{role: chosen_neurons(other)})
    assert called == []
