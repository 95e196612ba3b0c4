"""Linear layers of any class, seen through what wraps them: compilers, data parallelism, adapters, quantisation.

Shapes: a weight is ``[output, input]``, and ``[input, output]`` where it is transposed, as in GPT-2's ``Conv1D``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Under these names wrappers keep the one module they wrap: torch.compile, activation checkpointing, DDP and DeepSpeed.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper, with the same parameters; any other module as it is."""
    # Asking for the wrappers' own classes would import the whole compiler, and DeepSpeed.
    if len(module._modules) == 1:
        ((name, inner),) = module._modules.items()
        if name in WRAPPED and inner is not None:
            return unwrapped(inner)
    # Who holds a model of PEFT has imported it; to import it here would cost seconds, and it may not be installed.
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel | peft.PeftMixedModel):
        inner = module.base_model
        return unwrapped(inner.model if isinstance(inner, peft.tuners.tuners_utils.BaseTuner) else inner)
    return module


def acting(module: nn.Module) -> nn.Module:
    """The module that does the work there: itself, or the copy of it that PEFT trains in full (``modules_to_save``)."""
    inner = unwrapped(module)
    copies = inner._modules.get("modules_to_save")
    if not isinstance(copies, nn.ModuleDict):
        return inner
    wrapper: Any = inner
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
    return copies[active[0]] if active else wrapper.original_module


def linear_in(module: nn.Module) -> Any:
    """The linear layer with the weights: the module itself, or what PEFT has put an adapter around."""
    inner = acting(module)
    while inner._modules.get("base_layer") is not None:
        base = inner._modules["base_layer"]
        assert base is not None, "asked just now"
        inner = base
    return inner


def size_of(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, of whatever class, quantised or not; ``None`` for anything else."""
    linear = linear_in(module)
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    sizes = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if len(linear._modules) == 0 and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept ``[input, output]``, as GPT-2 does, so that a row of the matrix is its column."""
    return isinstance(linear_in(module), Conv1D)


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """The weight of a linear layer, if it is one parameter, packed or not."""
    weight = linear_in(module)._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def device_of(module: nn.Module) -> torch.device:
    """Where a linear layer's weights are."""
    linear: nn.Module = linear_in(module)
    for tensor in (*linear.parameters(), *linear.buffers()):
        return tensor.device
    return torch.device("cpu")


def weight_and_bias(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The weight and the bias of a linear layer by name, as far as it has them; not the scales of packed weights."""
    parameters = {name: linear._parameters.get(name) for name in ("weight", "bias")}
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}


def computed_weight(linear: nn.Module, inputs: int, precision: torch.dtype) -> Tensor | None:
    """Some of the weights of a layer that packs them in a way of its own, ``[input, output]``: what it makes of ones.

    The integers that hold them would not do: every kernel arranges them as it likes, some of them in the first pass,
    which has to be in the precision of the model.
    """
    tensor = next(one for one in (*linear.buffers(), *linear.parameters()) if one.numel() > 1)
    if tensor.is_meta:
        return None
    bias = getattr(linear, "bias", None)
    with torch.no_grad():
        columns: Tensor = linear.forward(torch.eye(16, inputs, dtype=precision, device=tensor.device))
    return columns if bias is None else columns - bias.to(columns.dtype)
