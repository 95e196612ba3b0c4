"""Models of which layers wait in main memory or on disk: as the plain ones, bit for bit, or refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn

from safeneuron.analysis.portraits import token_effects
from safeneuron.attacks.checkpoint import with_edit_in_weights
from safeneuron.attacks.finetuning import Demonstration, finetuned
from safeneuron.attacks.pruning import perplexity, respond
from safeneuron.attacks.refusal_direction import candidate_directions, without_direction
from safeneuron.config.toml import parse_config, read_config, to_toml
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from safeneuron.models.exchanges import exchanges_of
from safeneuron.models.forward import MeasurementSettings
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.models.vision_tower import measure_towers
from safeneuron.neurons.blocks import Block
from safeneuron.neurons.interventions import Edit, pruned
from safeneuron.neurons.layout import fingerprint
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.verification import prove
from safeneuron.neurons.weights import owned_slices
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import hand_back_memory, peak_memory_mb, reset_peak_memory, resident_memory
from safeneuron.runtime.offloading import is_offloaded, materialised
from safeneuron.selection.contrast import gradient_gap
from safeneuron.selection.linear_probe import probe
from safeneuron.selection.measurement import measure
from safeneuron.selection.saliency import snip, wanda
from safeneuron.training.alignment import align
from safeneuron.training.freezing import Freeze
from tests.helpers import tiny, tiny_experts, tiny_vision
from tests.helpers.tiny_run import execute, write_world

UNSAFE = [Prompt(f"how do I break {word}?") for word in ("a lock", "it", "this very old window")]
SAFE = [Prompt(f"how do I mend {word}?") for word in ("a lock", "it", "this very old window")]
ON_DISK = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "disk", "lm_head": "disk",
}  # fmt: skip
WAYS = ("cpu", "disk", "some")


def sent_away(network: nn.Module, way: str, folder: Path) -> nn.Module:
    """The network with its weights kept elsewhere; it computes on the CPU all the same."""
    if way == "cpu":
        return cpu_offload(network, execution_device=torch.device("cpu"))
    if way == "disk":
        return disk_offload(network, str(folder), execution_device=torch.device("cpu"))
    return dispatch_model(network, dict(ON_DISK), offload_dir=str(folder))


def kept(network: nn.Module) -> dict[str, Tensor]:
    """All weights as they are kept now."""
    found = {}
    for name, module in network.named_modules():
        with materialised(module):
            found |= {f"{name}.{key}": value.clone() for key, value in module.named_parameters(recurse=False)}
    return found


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Model, Model]]:
    """A plain model and its offloaded twin, which must be as before when the test is over."""
    plain, other = tiny.model(), tiny.model()
    other.network = sent_away(other.network, request.param, tmp_path)
    yield plain, other
    assert any(parameter.is_meta for parameter in other.network.parameters())
    assert plain.network.state_dict().keys() == kept(other.network).keys()
    for name, value in kept(other.network).items():
        assert torch.equal(value, plain.network.get_parameter(name)), name


def chosen(model: Model, count: int = 20) -> NeuronSet:
    return NeuronSet.of({layer: range(layer, count) for layer in range(tiny.LAYERS)}, model.widths, model.fingerprint)


def test_statistics_are_the_same(pair):
    plain, other = pair
    assert other.device == torch.device("cpu")
    assert other.fingerprint == plain.fingerprint
    for pooling in ("last", "mean", "max"):
        stats = [measure(model, UNSAFE, SAFE, MeasurementSettings(pooling=pooling, batch_tokens=64)) for model in pair]
        for moments in ("unsafe", "safe"):
            mine, its = (getattr(one, moments) for one in stats)
            assert torch.equal(mine.mean, its.mean)
            assert torch.equal(mine.m2, its.m2)


def test_answers_are_the_same_pruned_or_not(pair):
    for neurons in (None, chosen(pair[0])):
        answers = []
        for model in pair:
            with pruned(model, neurons):
                batches = list(respond(model, UNSAFE, max_new_tokens=6, batch_size=2))
                answers.append(
                    ([one.response for batch in batches for one in batch], perplexity(model, "a plain text"))
                )
        assert answers[0] == answers[1]


def test_the_refusal_direction_is_the_same_and_projected_out(pair):
    found = [candidate_directions(model, UNSAFE, SAFE) for model in pair]
    assert all(torch.equal(mine.vector, its.vector) for mine, its in zip(*found, strict=True))
    without = []
    for model in pair:
        with without_direction(model, found[0][-1]):
            without.append([one.response for batch in respond(model, SAFE, max_new_tokens=6) for one in batch])
    assert without[0] == without[1]


def test_selectors_that_read_weights_read_the_true_ones(pair):
    found = []
    for model in pair:
        exchanges = exchanges_of(model, UNSAFE, ["no, never"] * 3)
        found.append(
            [
                wanda(model, exchanges).values,
                probe(model, UNSAFE, SAFE).values,
                token_effects(model, 1, torch.tensor([3])),
            ]
        )
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)


def test_the_anatomy_is_proved_on_weights_brought_to_hand(pair):
    plain, other = (prove(model.network) for model in pair)
    assert plain == other
    assert not other.unproved


def test_an_anatomy_that_is_wrong_is_seen_on_offloaded_weights_too(tmp_path, monkeypatch):
    """As if a neuron's column were another one's."""
    network = disk_offload(tiny.network(), str(tmp_path), execution_device=torch.device("cpu"))
    right = Block.column
    monkeypatch.setattr(Block, "column", lambda block, neuron: right(block, (neuron + 1) % block.width))
    with pytest.raises(InputError, match="column"):
        prove(network)


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_experts_on_disk_are_as_they_are_in_memory(family, tmp_path):
    plain, other = tiny_experts.model(family), tiny_experts.model(family)
    other.network = disk_offload(other.network, str(tmp_path), execution_device=torch.device("cpu"))
    assert prove(other.network).probed == prove(plain.network).probed
    assert other.fingerprint == plain.fingerprint
    mine, its = (measure(model, UNSAFE, SAFE) for model in (plain, other))
    assert torch.equal(mine.unsafe.mean, its.unsafe.mean)
    assert torch.equal(mine.unsafe.per_neuron, its.unsafe.per_neuron)


@pytest.mark.parametrize("family", ["qwen2-vl", "gemma3"])
def test_pictures_are_seen_the_same(family, tmp_path):
    unsafe, safe = ([Prompt(one.text, image=tiny_vision.picture()) for one in some] for some in (UNSAFE, SAFE))
    plain, other = tiny_vision.model(family), tiny_vision.model(family)
    other.network = disk_offload(other.network, str(tmp_path), execution_device=torch.device("cpu"))
    for look in (partial(measure, settings=MeasurementSettings(pooling="mean")), measure_towers):
        mine, its = (look(model, unsafe, safe) for model in (plain, other))
        assert torch.equal(mine.unsafe.mean, its.unsafe.mean)
    assert list(respond(plain, unsafe, max_new_tokens=3)) == list(respond(other, unsafe, max_new_tokens=3))


def test_modelling_code_that_asks_weights_where_they_are_is_told(tmp_path):
    """Idefics3 and Mllama look at a weight's device; with their eyes and embeddings in memory they work."""
    prompts = [Prompt(one.text, image=tiny_vision.picture()) for one in UNSAFE]
    plain, other = tiny_vision.model("idefics3"), tiny_vision.model("idefics3")
    other.network = disk_offload(other.network, str(tmp_path / "all"), execution_device=torch.device("cpu"))
    for act in (lambda: measure(other, prompts, prompts), lambda: list(respond(other, prompts, max_new_tokens=2))):
        with pytest.raises(InputError, match="vision tower"):
            act()
    other = tiny_vision.model("idefics3")
    places = dict.fromkeys(("model.vision_model", "model.connector", "model.text_model.embed_tokens"), "cpu")
    places |= dict.fromkeys(("model.text_model.layers", "model.text_model.norm", "lm_head"), "disk")
    places["model.text_model.rotary_emb"] = "cpu"
    other.network = dispatch_model(other.network, places, offload_dir=str(tmp_path / "some"))
    mine, its = (measure(model, prompts, prompts) for model in (plain, other))
    assert torch.equal(mine.unsafe.mean, its.unsafe.mean)


def test_what_changes_weights_or_goes_back_through_them_is_refused(pair):
    _, other = pair
    neurons, exchanges = chosen(other), exchanges_of(other, UNSAFE, ["no, never"] * 3)
    before = vars(other.network.config).copy()
    asked = ({"role": "user", "content": "q"},)
    refused = {
        "align": lambda: align(other, [Pair(asked, "a", "b", "test")], neurons),
        "single weights": lambda: with_edit_in_weights(other, Edit.zero(neurons)).__enter__(),
        "back from the loss needs": lambda: snip(other, exchanges),
        "back from the loss": lambda: gradient_gap(other, exchanges, exchanges),
        "fine-tuning": lambda: finetuned(other, [Demonstration("q", "a")], steps=1).__enter__(),
        "look": lambda: owned_slices(other, neurons),
        "training": lambda: Freeze(other, neurons),
    }
    for told, act in refused.items():
        with pytest.raises(InputError, match=f"{told}.*offloaded"):
            act()
    assert vars(other.network.config).keys() == before.keys()


def test_a_change_of_what_is_at_hand_is_seen_by_passes_and_forgotten(pair):
    _, other = pair
    layer = other.network.model.layers[1].mlp
    before = perplexity(other, "a plain text")

    def break_off() -> None:
        with materialised(layer):
            layer.down_proj.weight.data.zero_()
            assert perplexity(other, "a plain text") != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert layer.down_proj.weight.is_meta
    assert perplexity(other, "a plain text") == before


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    tiny.model().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_loaded_with_layers_on_disk(stored):
    plain, other = load(stored, "float32"), load(stored, "float32", device_map=ON_DISK)
    assert is_offloaded(other.network)
    assert [name for name, one in other.network.named_parameters() if one.is_meta and ".1." in name]
    assert other.fingerprint == plain.fingerprint
    mine, its = (measure(model, UNSAFE, SAFE) for model in (plain, other))
    assert torch.equal(mine.unsafe.m2, its.unsafe.m2)


def test_placed_automatically_what_memory_does_not_hold_goes_to_disk(stored):
    plain, other = load(stored, "float32"), load(stored, "float32", device_map="auto", max_memory={"cpu": "90KB"})
    assert is_offloaded(other.network)
    assert [one.response for batch in respond(plain, SAFE, max_new_tokens=5) for one in batch] == [
        one.response for batch in respond(other, SAFE, max_new_tokens=5) for one in batch
    ]
    assert not is_offloaded(load(stored, "float32", device_map="auto").network)


def test_experts_that_the_checkpoint_holds_one_by_one_are_written_to_the_folder(tmp_path):
    plain = tiny_experts.model("qwen3-moe")
    plain.save(tmp_path / "model")
    with pytest.raises(InputError, match="offload"):
        load(tmp_path / "model", "float32", device_map={"": "disk"})
    other = load(tmp_path / "model", "float32", device_map={"": "disk"}, offload_folder=tmp_path / "away")
    mine, its = (measure(model, UNSAFE, SAFE) for model in (plain, other))
    assert torch.equal(mine.unsafe.mean, its.unsafe.mean)


def test_an_offloaded_model_is_saved_whole(stored, tmp_path):
    load(stored, "float32", device_map=ON_DISK).save(tmp_path / "again")
    first, second = (load(folder, "float32").network.state_dict() for folder in (stored, tmp_path / "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_weights_on_disk_that_are_not_finite_are_seen(tmp_path):
    broken = tiny.model()
    fingerprint(broken)
    broken.network.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    broken.save(tmp_path / "model")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj"):
        load(tmp_path / "model", "float32", device_map=ON_DISK)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device_map": "everywhere"}, "everywhere"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory"),
        ({"device_map": "auto", "device": "cpu"}, "device_map"),
        ({"device_map": "auto", "quantise": "4bit"}, "device_map"),
        ({"device_map": {"": "cuda:99"}}, "0 GPUs"),
        ({"device_map": {"": "drawer"}}, "drawer"),
    ],
)
def test_what_cannot_be_placed_is_explained(stored, options, told):
    with pytest.raises(InputError, match=told):
        load(stored, "float32", **options)


def test_several_processes_are_refused(stored, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(InputError, match="process"):
        load(stored, "float32", device_map="auto")


# -- in a run ---------------------------------------------------------------------------------------------------------

AUDIT = ("align.rounds=0", "variants={}", 'model.dtype="float32"', 'attack.selectors=["wanda", "probe"]')
SPREAD = ('model.device_map="auto"', "model.max_memory={cpu='90KB'}")


@pytest.mark.slow
def test_a_run_with_layers_on_disk_has_the_same_results_and_goes_on_as_the_same_run(tmp_path):
    config = write_world(tmp_path)
    for name, changes in (("plain", AUDIT), ("spread", (*AUDIT, *SPREAD))):
        for verb in ("measure", "select", "attack"):
            execute(config, tmp_path / name, verb=verb, changes=changes)
    made = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain" / "T0").rglob("*.json*"))
    assert len(made) > 20
    for path in made:
        if path.name != "done.json":
            assert (tmp_path / "plain" / path).read_bytes() == (tmp_path / "spread" / path).read_bytes(), path
    # Where layers wait is no setting of a stage, so that another machine may go on.
    again = execute(config, tmp_path / "plain", verb="attack", changes=(*AUDIT, *SPREAD))
    assert again.of("began") == []


@pytest.mark.parametrize(
    "change",
    [
        "align.rounds=1",
        'variants.more={"rounds"=1}',
        'attack.selectors=["snip"]',
        'attack.attempts=["fine-tune"]',
        'attack.backend="vllm"',
    ],
)
def test_what_needs_all_weights_is_refused_before_anything_is_loaded(tmp_path, change):
    config = write_world(tmp_path)
    with pytest.raises(InputError, match="device_map"):
        read_config(config, ["align.rounds=0", "variants={}", *SPREAD, change])


def test_the_settings_survive_being_written(tmp_path):
    settings = read_config("default", ["align.rounds=0", *SPREAD, "model.offload_folder='elsewhere'"])
    assert parse_config(to_toml(settings), "written") == settings
    table = read_config("default", ["align.rounds=0", "model.device_map={'model.layers'=0, 'lm_head'='cpu'}"])
    assert parse_config(to_toml(table), "written").model.device_map == {"model.layers": 0, "lm_head": "cpu"}


def test_capability_is_the_same(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'safeneuron[eval]'")
    from safeneuron.evaluation.capability import benchmark

    rows = [{"query": f"Question: which is {i}?", "choices": ["salt", "a river"], "gold": i % 2} for i in range(4)]
    (tmp_path / "arc_challenge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plain, other = tiny.model(), tiny.model()
    other.network = cpu_offload(other.network, execution_device=torch.device("cpu"))
    mine, its = (benchmark(model, "arc_challenge", str(tmp_path), shots=0) for model in (plain, other))
    assert mine == its


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_stays_that_of_a_layer_however_many_there_are(tmp_path):
    """Ten layers of 25 MB each are measured in the memory of two or three."""
    network = tiny.network(layers=10, hidden_size=512, intermediate_size=4096, head_dim=64)
    weight = sum(one.nbytes for one in network.model.layers[0].parameters())
    Model(network, tiny.tokenizer(), "mid", "mid").save(tmp_path / "model")
    del network
    model = load(tmp_path / "model", "float32", device_map={"": "disk"})
    hand_back_memory()
    reset_peak_memory()
    before = resident_memory()
    measure(model, UNSAFE, SAFE, MeasurementSettings(batch_tokens=256))
    assert 0.5 * weight < peak_memory_mb() * 2**20 - before < 3 * weight
