"""Weights in 4 bits through bitsandbytes: a network made so, and the plain network that it computes as.

Only 4 bits (NF4, as in QLoRA): there the layer computes with the weights that it can be turned back into. 8 bits
(LLM.int8) rounds the activations too, so that no plain network computes the same.

What is stored in GGUF or by compressed-tensors becomes a plain network when it is loaded.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from safeneuron.errors import InputError

TRAINABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# So many weights share a scale.
BLOCK = 64
# How the configs of checkpoints name the library that stored them.
COMPRESSED = "compressed-tensors"
# What transformers notes on a network whose weights are quantised.
QUANTIZATION_ATTRIBUTES = {"is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"}


def quantise(network: PreTrainedModel, decoder: nn.Module, device: torch.device) -> None:
    """Put every linear layer of the network's decoder into 4 bits, on the device, one after the other.

    All else keeps its precision and its place: the embeddings, the norms, the output layer.

    Args:
        network: The model, changed in place.
        decoder: Its text decoder.
        device: Where the packed weights are to be.

    Raises:
        InputError: Without bitsandbytes, and on a processor for layers of sizes that it does not handle there.
    """
    library = _bitsandbytes()
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear:
            if device.type == "cpu" and module.in_features % BLOCK:
                # bitsandbytes 0.50 unpacks such weights into wrong ones there.
                raise InputError(
                    f"{name} has {module.in_features} inputs, and on a processor weights in 4 bits are expected to "
                    f"have a multiple of {BLOCK}; use a GPU, or LoRA without quantise"
                )
            precision = module.weight.dtype
            small = library.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=precision, quant_type="nf4"
            )
            small.weight = library.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=small
            ).to(device)
            small.bias = module.bias
            # On some processors the library would repack the weights at the first answer, and round them once more.
            small.support_avx512bf16_for_cpu = False
            decoder.set_submodule(name, small.train(module.training))
    # What transformers sets on a model that it quantises itself: PEFT, TRL and accelerate ask for it.
    marked: Any = network
    marked.is_loaded_in_4bit = True


def dequantised(network: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU in which every linear layer in 4 bits is the plain one that it computes as.

    A network without such layers is returned as it is.
    """
    if not has_four_bits(network):
        return network
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear) and in_four_bits(module.weight):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(dense(module.weight).cpu())
            linear.bias = module.bias
            plain.set_submodule(name, linear.train(module.training))
    forget(plain)
    plain.to("cpu")  # type: ignore[arg-type]
    return plain


def forget(network: PreTrainedModel) -> None:
    """Take off a plain network what transformers noted when its weights were quantised, as those of GGUF files are."""
    # Only what was noted on this network: its class may have defaults of the same names.
    for mark in vars(network).keys() & QUANTIZATION_ATTRIBUTES:
        delattr(network, mark)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config


def compressed_by(config: PreTrainedConfig) -> str:
    """The format in which compressed-tensors has stored the model of this config; empty if it has not.

    The config is made to say that the cache of keys and values is not to be rounded, which is a matter of serving.

    Raises:
        InputError: For weights that are stored rotated, as transformers would take them for unrotated ones.
    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != COMPRESSED:
        return ""
    if settings.get("transform_config"):
        raise InputError(
            "the model is stored by compressed-tensors with transforms of its weights (transform_config), which "
            "transformers does not undo; use the checkpoint that it was made from"
        )
    settings["kv_cache_scheme"] = None
    if not settings.get("config_groups"):
        del config.quantization_config
        return ""
    return str(settings.get("format", COMPRESSED))


def decompress(network: PreTrainedModel, precision: torch.dtype) -> bool:
    """Turn a network that compressed-tensors has packed into the plain one that its weights stand for, in place.

    Returns whether its layers have rounded what goes in or out too, which plain ones do not. The library itself unpacks
    a model at its first answer, into the same weights, but only when it is called as a whole.
    """
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    rounded = False
    for module in network.modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        rounded |= scheme.input_activations is not None or scheme.output_activations is not None
        status: Any = module.quantization_status
        if status < QuantizationStatus.COMPRESSED:
            # Stored as they were before they were rounded, and rounded in every pass.
            compress_module(module)
        decompress_module(module, leave_decompressed=False)
        # The forward that rounded is an attribute of the layer, put over its class's own.
        vars(module).pop("forward", None)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    for parameter in network.parameters():
        # transformers unpacks experts into bfloat16, whatever it was asked for.
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(precision)
    hook: Any = getattr(network, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del network.ct_decompress_hook
    forget(network)
    return rounded


def packed_by(network: nn.Module) -> str:
    """The class of the first linear layer whose weights another library has packed (GPTQ, AWQ, ...); empty if none.

    Such a layer can be measured, pruned and given adapters like any other, but its weights cannot be read or written.
    """
    for module in network.modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if all(isinstance(size, int) for size in sizes):
            weight = module._parameters.get("weight")
            holds = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if weight is None and holds and not module._modules:
                return type(module).__name__
    return ""


def has_four_bits(network: nn.Module) -> bool:
    """Whether any weight of the network is packed by bitsandbytes."""
    return any(in_four_bits(parameter) for parameter in network.parameters())


def is_quantised(weight: Tensor) -> bool:
    """Whether the weight is held in a form that cannot be trained: packed by bitsandbytes, or of another small type."""
    return in_four_bits(weight) or weight.dtype not in TRAINABLE


def in_four_bits(weight: Tensor) -> bool:
    """Whether the weight is packed by bitsandbytes; in any storage type, which need not be one of integers."""
    return getattr(weight, "quant_state", None) is not None


def dense(weight: Tensor) -> Tensor:
    """The weight ``[output, input]`` that is computed with; packed ones are unpacked.

    Raises:
        InputError: For weights that bitsandbytes has repacked for a processor, which cannot be unpacked exactly.
    """
    if not in_four_bits(weight):
        return weight.detach()
    packed: Any = weight
    state = packed.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise InputError(
            "the 4-bit weights were repacked by bitsandbytes for this processor, and rounded by it; expected them as "
            "they were quantised, load the model with safeneuron.load(..., quantise='4bit')"
        )
    whole: Tensor = _bitsandbytes().functional.dequantize_4bit(weight.data, state)
    return whole


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            "weights in 4 bits need the package bitsandbytes, which is not installed; pip install 'safeneuron[quant]'"
        ) from error
    found: ModuleType = bitsandbytes
    return found
