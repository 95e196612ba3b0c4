"""The sizes of a model in numbers, from its config alone: what it needs and how long it computes follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.vision import takes_images
from safeneuron.neurons.anatomy import decoder_of, layers_of
from safeneuron.neurons.blocks import Layer
from safeneuron.neurons.layout import layers, widths_of

CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""Under these names configs say to how many experts a token is routed."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, in numbers, not bytes; those of a layer are the largest layer's.

    ``weights`` is how many weights all layers have, ``active`` how many of them one token goes through: of experts only
    those that it is routed to. ``norms``, ``inputs`` and ``outputs`` are how many numbers of a token go into all norms,
    and into and out of all linear layers of a layer, and ``linear`` is how many weights the latter have. ``stored`` is
    the bytes of a weight in the checkpoint.
    """

    name: str
    parameters: int
    largest: int
    layers: int
    layer: int
    linear: int
    hidden: int
    width: int
    queries: int
    keys: int
    heads: int
    norms: int
    weights: int
    active: int
    inputs: int
    outputs: int
    vocabulary: int
    tied: bool
    eager: bool
    stored: int

    @classmethod
    def of(cls, network: PreTrainedModel, name: str) -> Shape:
        """The shape of a network, whose weights may be on the meta device. Raises ``InputError`` like ``ffn``."""
        config: Any = network.config.get_text_config()
        heads = int(config.num_attention_heads)
        size = int(vars(config).get("head_dim") or config.hidden_size // heads)
        queries = heads * size
        keys = int(vars(config).get("num_key_value_heads") or heads) * size
        width = max(widths_of(network))
        blocks: Any = layers_of(decoder_of(network))
        layer = max(blocks, key=_parameters)
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        embeddings: Any = network.get_input_embeddings()
        head: Any = network.get_output_embeddings()  # type: ignore[no-untyped-call]
        stored: Any = network.config.dtype or torch.float32
        return cls(
            name=name,
            parameters=_parameters(network),
            largest=max(parameter.numel() for parameter in network.parameters()),
            layers=len(blocks),
            layer=_parameters(layer),
            linear=sum(module.weight.numel() for module in linear),
            hidden=int(config.hidden_size),
            width=width,
            queries=queries,
            keys=keys,
            heads=heads,
            norms=sum(_normed(module, config.hidden_size, queries, keys) for module in layer.modules()),
            weights=sum(_parameters(block) for block in blocks),
            active=sum(_active(each, config) for each in layers(network)),
            inputs=sum(module.in_features for module in linear),
            outputs=sum(module.out_features for module in linear),
            vocabulary=len(embeddings.weight),
            tied=head is not None and head.weight is embeddings.weight,
            eager=config._attn_implementation == "eager",
            stored=stored.itemsize,
        )

    @classmethod
    def read(cls, name: str, revision: str = "", trust_remote_code: bool = False) -> Shape:
        """The shape that a model's config describes; no weights are read, so that they need not be there.

        Raises ``InputError`` when there is no config, or it is of a model that ``ffn`` does not know.
        """
        network = cls.network(name, revision, trust_remote_code)
        return cls.of(network, embedded.LABEL if name == embedded.NAME else name)

    @staticmethod
    def network(name: str, revision: str = "", trust_remote_code: bool = False) -> PreTrainedModel:
        """The network that a model's config describes, on the meta device; raises ``InputError`` as ``read`` does."""
        source = str(embedded.embedded_folder()) if name == embedded.NAME else name
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(source, revision=revision or "main", **options)
            kind: Any = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
            with torch.device("meta"):
                network: PreTrainedModel = kind.from_config(config, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"the config of the model {name!r} cannot be read ({reason}); expected 'embedded', a folder with a "
                "config.json in Hugging Face form, or a name on the Hub that this machine can reach"
            ) from error
        return network


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active(layer: Layer, config: Any) -> int:
    """How many weights of a layer one token goes through."""
    active = float(_parameters(layer.module))
    chosen = next((size for name in CHOSEN if isinstance(size := vars(config).get(name), int)), None)
    # Routed experts are the first block of the layer, or a block each.
    stacked = [block for block in layer.blocks[:1] if block.is_mixture]
    split = [block for block in layer.blocks if block.expert is not None]
    for experts in (stacked, split):
        count = sum(block.count for block in experts)
        modules = {id(module): module for block in experts for module in block.modules()}
        if count:
            active -= sum(map(_parameters, modules.values())) * max(0.0, 1 - (chosen or count) / count)
    return round(active)


def _normed(module: nn.Module, hidden: int, queries: int, keys: int) -> int:
    """How many numbers of a token a module normalises: the hidden size, or all queries or keys, a head at a time."""
    if "Norm" not in type(module).__name__:
        return 0
    weights = _parameters(module)
    return hidden if weights in (hidden, 2 * hidden, 0) else (queries + keys) // 2
