"""Weights that accelerate keeps in main memory or on disk until their layer runs, and puts back after it.

Between passes such a parameter is on the meta device: it has a shape, but no values. Modules are hooked as they were
before, since accelerate's hooks are around each module's forward; whoever reads weights must materialise them first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from safeneuron.errors import InputError
from safeneuron.runtime import distributed

PLACINGS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The ways in which accelerate places layers by itself."""

DeviceMap = str | Mapping[str, int | str]


def placed(device_map: DeviceMap, max_memory: Mapping[str, int | str], folder: str | Path) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for a device map; none without one.

    Args:
        device_map: A placing of accelerate, or the device of each module by its name.
        max_memory: What may be taken of each device, by its number, and of ``cpu``.
        folder: Where weights are written that cannot be read from the checkpoint as they are.

    Raises:
        InputError: For an unknown placing, a device that is not there, a limit without a device map, or several
            processes.
    """
    if not device_map:
        if max_memory or folder:
            raise InputError("max_memory and offload_folder are of a device_map; give one, such as device_map = 'auto'")
        return {}
    if isinstance(device_map, str) and device_map not in PLACINGS:
        raise InputError(
            f"device_map {device_map!r} is unknown; expected {', '.join(PLACINGS)}, or a table of modules and devices"
        )
    if distributed.world() > 1:
        raise InputError(
            f"device_map spreads a model over all devices, so it is for one process, not {distributed.world()}; "
            "start one, or leave it out"
        )
    if not isinstance(device_map, str):
        for place in device_map.values():
            _require_device(place)
    options: dict[str, Any] = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    if max_memory:
        options["max_memory"] = {int(name) if name.isdigit() else name: size for name, size in max_memory.items()}
    if folder:
        options["offload_folder"] = str(folder)
    return options


def _require_device(place: int | str) -> None:
    """Raise ``InputError`` for a device that is not there."""
    gpus = torch.cuda.device_count()
    if place in ("cpu", "disk") or place in range(gpus):
        return
    number = str(place).removeprefix("cuda:")
    if not number.isdigit():
        raise InputError(f"device_map names {place!r}, which is no device; expected cpu, disk, or the number of a GPU")
    if int(number) >= gpus:
        raise InputError(
            f"device_map names {place!r}, which is not there: torch {torch.__version__} sees {gpus} GPUs; name another"
        )


def is_offloaded(network: nn.Module) -> bool:
    """Whether accelerate brings any of the weights only when they are needed."""
    return any(_offload_of(module) is not None for module in network.modules())


def require_whole(network: nn.Module, what: str) -> None:
    """Refuse a model of which weights are offloaded.

    Args:
        network: The model.
        what: What cannot be done with one, as the beginning of the error.

    Raises:
        InputError: If any of its weights are offloaded.
    """
    if is_offloaded(network):
        raise InputError(
            f"{what} needs all weights in memory, but those of this model are offloaded to main memory or disk; load "
            "it without device_map, on a device that holds it"
        )


def device_of_inputs(network: nn.Module) -> torch.device | None:
    """Where a dispatched model computes first, and so where its inputs belong; ``None`` if it is not dispatched."""
    for module in network.modules():
        for hook in _hooks_of(module):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return None


@contextmanager
def explaining_meta_tensors(network: nn.Module) -> Iterator[None]:
    """Within the block a computation with weights on the meta device is an ``InputError`` that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if "meta tensor" not in str(error) or not is_offloaded(network):
            raise
        raise InputError(
            f"{type(network).__name__} cannot compute with these weights offloaded, since its code looks at where they "
            "are; keep the vision tower and the embeddings in memory with a table as device_map"
        ) from error


@contextmanager
def materialised(*modules: nn.Module) -> Iterator[None]:
    """Within the block the modules' offloaded weights are where they are computed with, as copies; then away again.

    A change made to them within the block is seen by the passes in it, and forgotten afterwards. Weights that are not
    offloaded are left alone.
    """
    with ExitStack() as stack:
        for module in (part for whole in modules for part in whole.modules()):
            hook = _offload_of(module)
            if hook is not None:
                stack.enter_context(_brought(module, hook))
        yield


@contextmanager
def _brought(module: nn.Module, hook: AlignDevicesHook) -> Iterator[None]:
    hook.pre_forward(module)
    hook.offload = False
    try:
        for parameter in module.parameters(recurse=hook.place_submodules):
            # On the CPU these may be the very tensors that are kept.
            parameter.data = parameter.data.clone()
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def _offload_of(module: nn.Module) -> AlignDevicesHook | None:
    return next((hook for hook in _hooks_of(module) if hook.offload), None)


def _hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    """Accelerate's hooks on a module that move weights and inputs."""
    # The module's own: what PEFT puts around a module hands out the attributes of the inner one as if they were its.
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]
