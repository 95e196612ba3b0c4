"""Training that fits into memory: fewer pairs at a time, then gradient checkpointing, or else a clear no."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from safeneuron.errors import InputError
from safeneuron.planning import GB, Device, Need, total
from safeneuron.training import Training

MARGIN = 1.1
"""A plan fits if the memory is so many times what it needs: the estimates are within about so much."""


@dataclass(frozen=True)
class Plan:
    """How a training is done, what it needs with pairs of at most ``length`` tokens, and the device for that."""

    training: Training
    need: Need
    device: Device
    length: int
    changed: bool

    @property
    def fits(self) -> bool:
        """Whether the device has what it needs, as far as is known."""
        return fits(self.need, self.device)

    def sentence(self) -> str:
        """The plan in one line."""
        return f"{needs(self.need)} of {available(self.device)}; {ways(self.training)}, up to {self.length} tokens each"

    def to_record(self) -> dict[str, Any]:
        """The plan for JSON, sizes in bytes."""
        return {
            "need": {name: round(size) for name, size in self.need.items()} | {"total": round(total(self.need))},
            "available": None if self.device.memory is None else round(self.device.memory),
            "length": self.length,
            "at_once": self.training.at_once,
            "gradient_checkpointing": self.training.gradient_checkpointing,
            "changed": self.changed,
        }


def plan(
    training: Training, device: Device, length: int, need: Callable[[Training], Need], change: bool = True
) -> Plan:
    """The training as it is asked for if it fits, or, with ``change``, in the first of these ways that does.

    Fewer pairs of a micro-batch at a time, by halves; then gradient checkpointing, with as many at a time as fit. Both
    leave the results as they are, to rounding. The least of them, or the training as it was asked for without
    ``change``, is returned also when it does not fit.
    """
    tried = training
    for tried in _ways(training) if change else [training]:
        if fits(need(tried), device):
            break
    return Plan(tried, need(tried), device, length, tried != training)


def require_fit(plan: Plan, what: str) -> None:
    """Raise ``InputError`` if even this plan does not fit into memory."""
    if not plan.fits:
        raise InputError(
            f"{what} needs {needs(plan.need)} even with {ways(plan.training)} of {plan.length} tokens each, and there "
            f"are {available(plan.device)}; train adapters (lora_rank) instead of all weights, use more or larger "
            "devices, or a smaller max_length"
        )


def fits(need: Need, device: Device) -> bool:
    """Whether it fits, with a margin; without knowledge of the device it does."""
    return device.memory is None or total(need) * MARGIN <= device.memory


def needs(need: Need) -> str:
    """The total and its largest parts: ``5.1 GB (activations 1.9, optimizer 1.0, weights 0.5, ...)``."""
    largest = sorted(need.items(), key=lambda part: -part[1])
    named = [f"{name} {size / GB:.1f}" for name, size in largest if size >= GB / 20][:5]
    return f"{gigabytes(total(need))} ({', '.join(named)})" if named else gigabytes(total(need))


def available(device: Device) -> str:
    """What the device has."""
    return "an unknown amount" if device.memory is None else gigabytes(device.memory)


def gigabytes(size: float) -> str:
    """A size in GB of 2**30 bytes."""
    return f"{size / GB:,.1f} GB"


def ways(training: Training) -> str:
    """How many pairs at a time, and whether their activations are computed again."""
    count = training.at_once or training.micro_batch_size
    pairs = f"{count} pair{'s' if count > 1 else ''} at a time"
    return pairs + (" and gradient checkpointing" if training.gradient_checkpointing else "")


def _ways(training: Training) -> Iterator[Training]:
    for checkpointing in sorted({training.gradient_checkpointing, True}):
        size = training.at_once or training.micro_batch_size
        yield replace(training, gradient_checkpointing=checkpointing)
        while size > 1:
            size = (size + 1) // 2
            yield replace(training, gradient_checkpointing=checkpointing, at_once=size)
