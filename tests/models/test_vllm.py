"""Answers through vLLM: what it is asked, against a stand-in that answers greedily; and vLLM itself where it is."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from safeneuron.attacks.pruning import respond
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.vllm import served
from tests.helpers import tiny
from tests.helpers.tiny_run import execute

PROMPTS = [Prompt(text) for text in ("a", "how do I?", "x" * 30, "tell me", "b")]


class SamplingParams:
    """Only what the project may ask for; anything else is a TypeError, as in vLLM."""

    def __init__(self, *, temperature, max_tokens, stop_token_ids):
        self.temperature, self.max_tokens, self.stop_token_ids = temperature, max_tokens, stop_token_ids


class LLM:
    """Greedy answers of a folder, each prompt alone and token by token, in the form of vLLM's results."""

    made: list[dict] = []  # noqa: RUF012

    def __init__(self, *, model, **options):
        if "broken" in model:
            raise ValueError("no kernel for this\nmodel")
        self.made.append(options)
        self.network = AutoModelForCausalLM.from_pretrained(model)

    def generate(self, prompts, sampling_params, use_tqdm):
        assert sampling_params.temperature == 0.0
        assert not use_tqdm
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _answer(self, ids, settings):
        ids, start = list(ids), len(ids)
        while len(ids) < start + settings.max_tokens:
            with torch.inference_mode():
                ids.append(int(self.network(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in settings.stop_token_ids:
                break
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids[start:])])


@pytest.fixture
def vllm(monkeypatch):
    """A module of that name with the two classes."""
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made.clear()


@pytest.fixture
def folder(tmp_path):
    tiny.model(seed=3).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_run_by_vllm_has_the_same_answers(vllm, finished_run, tmp_path):
    _, config, _ = finished_run
    changes = (
        'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.curve=[]", "variants={}", "align.rounds=0",
        'attack.attempts=["prefill-sure", "direction"]', "attack.max_new_tokens=6",
    )  # fmt: skip
    execute(config, tmp_path / "own", changes=changes)
    assert LLM.made == []
    execute(config, tmp_path / "vllm", changes=(*changes, 'attack.backend="vllm"'))
    assert len(LLM.made) == 4, "intact, FULL, random and prefilled; the direction is no weight"
    names = {path.relative_to(tmp_path / "own") for path in (tmp_path / "own").glob("T0/attack/*/*.jsonl")}
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "own" / name).read_bytes(), name


def test_the_same_answers_in_the_same_batches(vllm, folder):
    model = load(folder, dtype="float32")
    wanted = list(respond(model, PROMPTS, max_new_tokens=8, batch_size=2))
    with served(folder) as server:
        assert list(respond(server, PROMPTS, max_new_tokens=8, batch_size=2)) == wanted
        assert list(respond(server, PROMPTS, max_new_tokens=8, batch_size=2, skip=2)) == wanted[1:]
    assert server.engine is None, "the GPU's memory is free again"
    assert LLM.made == [
        {
            "dtype": "auto",
            "tensor_parallel_size": 1,
            "gpu_memory_utilization": 0.9,
            "generation_config": "vllm",
            "seed": 0,
            "enable_prefix_caching": False,
        }
    ]


def test_an_answer_ends_at_any_end_of_the_generation_settings(vllm, folder):
    model = load(folder, dtype="float32")
    (whole,) = next(iter(respond(model, PROMPTS[:1], max_new_tokens=8)))
    stop = model.tokenizer(whole.response)["input_ids"][1]
    model.network.generation_config.eos_token_id = [0, stop]
    model.save(folder)
    with served(folder) as server:
        assert server.ends == sorted({0, stop})
        found = list(respond(server, PROMPTS, max_new_tokens=8))
    assert found == list(respond(load(folder, dtype="float32"), PROMPTS, max_new_tokens=8))
    assert all(answer.response != whole.response for batch in found for answer in batch if answer.index == 0)
    (folder / "generation_config.json").unlink()
    with served(folder) as server:
        assert server.ends == [0]


def test_an_error_within_the_block_gives_the_memory_back(vllm, folder):
    with pytest.raises(KeyError), served(folder) as server:
        raise KeyError
    assert server.engine is None


def test_what_cannot_be_served_is_said(vllm, folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no checkpoint \(config.json is missing\)"), served(tmp_path):
        pass
    folder.rename(tmp_path / "broken")
    with pytest.raises(InputError, match=r"vLLM cannot load .*no kernel for this\); load"), served(tmp_path / "broken"):
        pass


def test_without_vllm_one_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install 'safeneuron\[vllm\]'"), served(folder):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's wheels need a GPU")
def test_vllm_itself_gives_the_same_text(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'safeneuron[vllm]'")
    folder = tmp_path / "model"
    tiny.model(head_dim=64).save(folder)  # Its kernels know no smaller heads.
    wanted = list(respond(load(folder, dtype="float32"), PROMPTS, max_new_tokens=16, batch_size=2))
    with served(folder, dtype="float32", memory_share=0.3) as server:
        assert list(respond(server, PROMPTS, max_new_tokens=16, batch_size=2)) == wanted
