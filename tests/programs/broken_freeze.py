"""Training whose freeze is broken on purpose; prints what each way of it raises, one line a way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch

from safeneuron.data.types import Pair
from safeneuron.training import alignment
from safeneuron.training.alignment import align
from safeneuron.training.freezing import Freeze, FreezeNeurons, frozen
from safeneuron.training.settings import TrainingSettings
from tests.helpers import tiny
from tests.helpers.frozen_checks import some_neurons

PAIRS = [Pair(({"role": "user", "content": f"question {i}"},), "No.", f"Sure, {i}", "test") for i in range(4)]
SETTINGS = TrainingSettings(
    learning_rate=1e-2, epochs=1, batch_size=4, micro_batch_size=4, warmup_share=0.0, max_length=64,
    precision="float32",
)  # fmt: skip


def loop() -> None:
    """A loop by hand, whose optimizer decays every weight."""
    network = tiny.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    with frozen(network, some_neurons(network), optimizer):
        network(torch.tensor([[5, 6]])).logits.sum().backward()
        optimizer.step()


def preference() -> None:
    """``align``, all the way to its end."""
    model = tiny.model()
    align(model, PAIRS, some_neurons(model.network), SETTINGS)


def rest() -> None:
    """``align`` with what belongs to no neuron to be left as it is."""
    model = tiny.model()
    align(model, PAIRS, some_neurons(model.network), SETTINGS, freeze_rest=True)


@contextmanager
def nothing(parameters: object):
    """In place of what keeps gradients from parameters."""
    yield


def said(work: Callable[[], None]) -> str:
    """The kind of the exception and its sentence."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    """Break one thing after the other."""
    print("optimised" if not __debug__ else "debug")
    restore = Freeze.restore
    Freeze.restore = lambda self: None
    print("loop", said(loop))
    print("preference", said(preference))
    # Even where the callback proves nothing, the result is not handed out.
    FreezeNeurons.on_train_end = lambda self, *_, **__: self.close()
    print("unproved", said(preference))
    Freeze.restore = restore
    alignment.untrained = nothing
    print("rest", said(rest))


if __name__ == "__main__":
    sys.exit(main())
