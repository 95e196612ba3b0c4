"""Tiny random mixtures of experts, in the layouts that occur, and what each neuron says, worked out token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from safeneuron.models.model import Model
from tests.helpers import tiny

EXPERTS, WIDTH, SHARED = 4, 24, 40

COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
}
MIXTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 8, "norm_topk_prob": True},
    ),
    "qwen2-moe": (
        Qwen2MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": SHARED},
    ),
    "olmoe": (OlmoeConfig, {"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "deepseek-v3": (
        DeepseekV3Config,
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gpt-oss": (GptOssConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "head_dim": 8}),
    "llama4": (
        Llama4TextConfig,
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
}


def network(family: str = "qwen3-moe", seed: int = 0, **changes: Any) -> nn.Module:
    """A random mixture of experts, float32, in evaluation mode, in which no weight is zero."""
    torch.manual_seed(seed)
    kind, own = MIXTURES[family]
    config = kind(**{**COMMON, **own, **changes})
    made = Llama4ForCausalLM(config) if family == "llama4" else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return made.eval()


def model(family: str = "qwen3-moe", seed: int = 0, **changes: Any) -> Model:
    """A tiny chat model as ``safeneuron.load`` would return it."""
    return Model(network(family, seed, **changes), tiny.tokenizer(), f"tiny-{family}", f"tiny-{family}")


class Expert(nn.Module):
    """One expert as a module of its own, as models had them before their weights were stacked."""

    def __init__(self, gate_up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.w1, self.w2, self.w3 = (nn.Linear(*one.shape[::-1], bias=False) for one in (gate, down, up))
        for linear, weight in ((self.w1, gate), (self.w2, down), (self.w3, up)):
            linear.weight = nn.Parameter(weight.detach().clone())
        self.act = act

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(hidden)) * self.w3(hidden))


class Experts(nn.ModuleList):
    """The experts of one layer as a list."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, place = torch.where(index == number)
            if len(tokens):
                out.index_add_(0, tokens, expert(hidden[tokens]) * weights[tokens, place, None])
        return out


def split(stacked: nn.Module) -> nn.Module:
    """The same model with every expert a module of its own; changes the network that it is given."""
    for layer in stacked.get_decoder().layers:
        old = layer.mlp.experts
        parts = zip(old.gate_up_proj, old.down_proj, strict=True)
        layer.mlp.experts = Experts(Expert(gate_up, down, old.act_fn) for gate_up, down in parts)
    return stacked


def spoken(network: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """``[row, token, neuron]`` of a Qwen3-MoE, token by token and expert by expert; NaN where there is nothing."""
    mlp = network.get_decoder().layers[layer].mlp
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(input_ids=ids)
        handle.remove()
        found = torch.full((*ids.shape, EXPERTS * WIDTH), torch.nan)
        for row, token in torch.cartesian_prod(*(torch.arange(size) for size in ids.shape)).tolist():
            hidden = seen[0][row, token]
            for expert in (mlp.gate.weight @ hidden).topk(2).indices.tolist():
                gate, up = (mlp.experts.gate_up_proj[expert] @ hidden).chunk(2)
                values = nn.functional.silu(gate) * up
                found[row, token, expert * WIDTH : (expert + 1) * WIDTH] = values
    return found
