"""Neurons at zero in the policy while it is trained: a fixed set (Algorithm 1), or what is found again meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class Ablation:
    """Which neurons are zero in the policy, and in what share of the optimizer steps, evenly spread (Algorithm 1).

    Args:
        neurons: The neurons.
        share: The share of the optimizer steps in which they are zero, from 0 to 1.
        reference: Whether they are zero in the reference too, which is computed once, so only with a share of 1.

    Raises:
        InputError: For an ablated reference with another share.
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


@dataclass(frozen=True)
class Refresh:
    """How the running model is attacked while it is trained.

    In each micro-batch one of the sets that were found is drawn and is zero for a share of the pairs;
    ``kl_weight * KL(intact || ablated)``, the mean over those pairs' answer tokens, is added to the loss.

    Args:
        find: Gives the sets that an attacker would prune from the model as it is now, each holding the one before it:
            those of one search, of a second search with the first set pruned, and so on.
        every: The optimizer steps from one search to the next.
        share: The share of the pairs of a micro-batch for which a set is zero, from 0 to 1.
        kl_weight: The weight of the KL term beside DPO's loss.
    """

    find: Callable[[Model], Sequence[NeuronSet]]
    every: int = 16
    share: float = 0.5
    kl_weight: float = 0.1


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
