"""Algorithm 1: neurons at zero in the policy's forward passes while it is trained."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.errors import InputError
from safeneuron.ffn import pruned
from safeneuron.neurons import NeuronSet


@dataclass(frozen=True)
class Ablation:
    """Which neurons are zero in the policy, and in what share of the optimizer steps, evenly spread.

    ``reference`` ablates them in the reference too, which is computed once, so only a share of 1 can have it.
    Raises ``InputError`` for another share.
    """

    neurons: NeuronSet
    share: float = 1.0
    reference: bool = False

    def __post_init__(self) -> None:
        if self.reference and self.share < 1:
            raise InputError(
                f"the reference is computed once, so it can only be ablated along with the policy in every step; found "
                f"ablate_share = {self.share:g}, use 1.0 or leave the reference intact"
            )


class AblateSteps(TrainerCallback):
    """Put an ablation into force in its share of the steps.

    Which steps depends on their number alone, so that resumed training ablates the same ones.
    """

    def __init__(self, ablation: Ablation) -> None:
        self.ablation = ablation
        self._block = ExitStack()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Set the neurons to zero if it is this step's turn."""
        step, share = state.global_step, self.ablation.share
        if int((step + 1) * share) > int(step * share):
            assert model is not None, "the trainer hands its model to callbacks"
            self._block.enter_context(pruned(model, self.ablation.neurons))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let them be active again."""
        self.close()

    def close(self) -> None:
        """Let all neurons be active again, also after a step that ended with an exception."""
        self._block.close()
