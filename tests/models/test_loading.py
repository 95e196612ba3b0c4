"""Loading: what a folder or name becomes, what is refused and why, and what a caller's logging stays."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.loading import load, quiet
from safeneuron.neurons.layout import LINEAGE
from safeneuron.runtime.devices import bfloat16_pays
from tests.helpers import tiny

TEXTS = ("a", "how do I do it?", "tell me more", "x" * 40, "what then", "b", "good morning to you")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny Llama; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.model().save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, value in changes.items():
        del weights[name]
        if value is not None:
            weights[name] = value
    save_file(weights, path, {"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- save and load --------------------------------------------------------------------------------------------


def test_save_and_load_keep_weights_and_neurons(family, tmp_path):
    model = tiny.model(family)
    known = model.fingerprint
    model.save(tmp_path)
    back = load(tmp_path, dtype="float32", device="cpu")
    assert back.fingerprint == known
    assert back.widths == model.widths
    assert (back.name, back.source) == (str(tmp_path), str(tmp_path))
    assert not back.network.training
    theirs = back.network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.network.state_dict().items())
    assert back.ask(Prompt("hi")) == model.ask(Prompt("hi"))


def test_lineage_survives_training_saving_and_loading(tmp_path):
    first = tiny.model()
    known = first.fingerprint
    first.save(tmp_path / "T0")
    second = load(tmp_path / "T0", dtype="float32")
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.mul_(-1)
    assert second.fingerprint == known
    second.save(tmp_path / "T1")
    third = load(str(tmp_path / "T1"))
    assert third.fingerprint == known
    assert getattr(third.network.config, LINEAGE) == known
    # It is the lineage that says so: by its weights, this is another model.
    delattr(third.network.config, LINEAGE)
    assert third.fingerprint != known


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_load_in_a_precision(saved, dtype, expected):
    model = load(saved, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.network.parameters()} == {expected}
    assert model.stored_dtype == torch.float32
    assert model.device == CPU


def test_stored_precision_is_remembered(tmp_path):
    model = tiny.model()
    model.network.to(torch.bfloat16)
    model.save(tmp_path)
    back = load(tmp_path, dtype="float32", device="cpu")
    assert back.stored_dtype == torch.bfloat16
    assert back.network.dtype == torch.float32
    assert back.fingerprint == model.fingerprint


def test_automatic_precision_and_device(saved):
    model = load(saved)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.network.dtype == (torch.bfloat16 if bfloat16_pays(model.device) else torch.float32)


def test_tied_embeddings_are_not_missed(tmp_path):
    model = tiny.model(tie_word_embeddings=True)
    model.save(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(tmp_path, dtype="float32").fingerprint == model.fingerprint


def test_padding_token_falls_back_to_the_end_token(copy):
    change_json(copy / "tokenizer_config.json", pad_token=None)
    assert load(copy).tokenizer.pad_token == "<|end|>"


def test_tokenizer_without_any_end_is_refused(copy):
    change_json(copy / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(InputError, match="no padding and no end token"):
        load(copy)


def test_embedded_model_has_a_name_of_its_own(saved, monkeypatch):
    monkeypatch.setattr(embedded, "embedded_folder", lambda: saved)
    model = load("embedded")
    assert (model.name, model.source) == (embedded.LABEL, str(saved))


def test_remote_code_is_never_run_unasked(copy):
    assert inspect.signature(load).parameters["trust_remote_code"].default is False
    change_json(copy / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (copy / "mine.py").write_text(f"open({str(copy / 'proof')!r}, 'w')\n")
    with pytest.raises(InputError, match="contains custom code"):
        load(copy)
    assert not (copy / "proof").exists()


def test_options_reach_the_loader(saved, monkeypatch):
    for options, expected in (
        ({}, {"trust_remote_code": False, "revision": "main"}),
        ({"revision": "abc", "trust_remote_code": True}, {"trust_remote_code": True, "revision": "abc"}),
    ):
        for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
            seen: list[dict[str, object]] = []

            def spy(source: str, seen: list[dict[str, object]] = seen, **given: object) -> None:
                seen.append(given)
                raise OSError("seen enough")

            with monkeypatch.context() as patch:
                patch.setattr(loader, "from_pretrained", spy)
                with pytest.raises(InputError, match="seen enough"):
                    load(saved, **options)
            assert seen[0].items() >= expected.items()


# -- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "a/b/c/d", "", "embeded"])
def test_unknown_model(name):
    with pytest.raises(InputError, match=rf"the model '{name}' cannot be loaded .*expected 'embedded', a folder"):
        load(name)


def test_folder_without_safetensors(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot be loaded .*safetensors"):
        load(copy)


def test_torn_safetensors(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load(copy)


def test_broken_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(copy)


def test_weights_of_another_size(copy):
    change_json(copy / "config.json", intermediate_size=56)
    with pytest.raises(
        InputError, match=r"lacks 9 of its weights, or has .*\(first: model.layers.0.mlp.down_proj.weight"
    ):
        load(copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_weights_are_not_made_up(copy, name):
    change_weights(copy, **{name: None})
    with pytest.raises(InputError, match=rf"lacks 1 of its weights.*\(first: {name}\), so that they would be random"):
        load(copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(copy, value):
    name = "model.layers.2.self_attn.q_proj.weight"
    spoilt = load_file(copy / "model.safetensors")[name]
    spoilt[3, 4] = value
    change_weights(copy, **{name: spoilt})
    with pytest.raises(InputError, match=rf"not finite in {name}"):
        load(copy)


def test_unknown_anatomy(tmp_path):
    model = tiny.model()
    model.network.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 8, "state_size": 4, "vocab_size": 260}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no layer of MambaModel has an FFN"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
def test_unknown_precision(saved, dtype):
    with pytest.raises(InputError, match=rf"^dtype '{dtype}' is unknown; expected auto, float32, bfloat16, float16"):
        load(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_unknown_device(saved, device):
    with pytest.raises(InputError, match=rf"^device '{device}' is unknown"):
        load(saved, device=device)


def test_gpu_that_is_not_there(saved):
    with pytest.raises(InputError, match=r"'cuda:99' was asked for, but torch .* sees \d+ GPUs"):
        load(saved, device="cuda:99")


# -- what is left to the caller -------------------------------------------------------------------------------


def logging_of_libraries() -> tuple[int, list[int], int]:
    return (
        transformers_logging.get_verbosity(),
        [logging.getLogger(name).level for name in ("datasets", "trl", "accelerate", "httpx")],
        len(warnings.filters),
    )


def test_loading_leaves_the_logging_of_the_process_as_it_was(saved):
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    before = logging_of_libraries()
    load(saved, "float32", "cpu")
    assert logging_of_libraries() == before
    assert transformers_logging.is_progress_bar_enabled()


def test_a_program_may_choose_quiet(monkeypatch):
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    levels = {name: logging.getLogger(name).level for name in ("datasets", "trl", "accelerate", "httpx")}
    try:
        quiet()
        assert logging_of_libraries()[:2] == (logging.ERROR, [logging.ERROR] * 4)
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
        transformers_logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
