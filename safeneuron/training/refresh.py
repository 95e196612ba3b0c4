"""`refresh`: preference training against the attacker who searches again.

Freezing T0's neurons, or ablating them, teaches nothing about the neurons that refusals come to hang on while the model
is trained. So every so many steps the neurons are found again on the running model, as the attacker would find them,
and set to zero in the policy for a random share of each batch; a KL term ties the ablated policy to the intact one.
The preference loss stays TRL's: an ablated pair is one whose answers are scored by the pruned policy, against the same
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from safeneuron.models.exchanges import log_probabilities
from safeneuron.models.model import Model
from safeneuron.models.vision import run_without_head
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runtime.files import read_json, write_json
from safeneuron.training.ablation import Refresh
from safeneuron.training.dpo import PreferenceTrainer
from safeneuron.training.microbatches import pair_count

FILE = "refresh.json"
NOT_SEEN = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""What of a micro-batch the loss is given, and the model is not."""
ROWS, SET = "ablated_rows", "ablated_set"
"""The names, among a micro-batch's tensors, of what says which of its rows are ablated, and by which set's number."""


class RefreshTrainer(PreferenceTrainer):
    """TRL's DPO with a share of each batch ablated.

    Args:
        refresh: How the neurons are found again, and what is done with them.
        given: The model whose network is trained; the running policy is handed to ``refresh.find`` in its form.
        settings: What ``PreferenceTrainer`` takes.
    """

    ablated_rows: Tensor

    def __init__(self, *, refresh: Refresh, given: Model, **settings: Any) -> None:
        self.refresh = refresh
        self.given = given
        self.sets: Sequence[NeuronSet] = ()
        self.found_at = -1
        self.turn = (-1, 0)
        self.teacher: Tensor | None = None
        super().__init__(**settings)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, with what is ablated in it drawn for the whole of it."""
        self._find_when_due()
        generator = self._generator()
        pairs = torch.rand(pair_count(inputs), generator=generator).argsort()
        count = int(self.refresh.share * len(pairs) + float(torch.rand((), generator=generator)))
        drawn = int(torch.randint(len(self.sets), (), generator=generator))
        # An entry for each row, so that a micro-batch that is run in parts is split with its ablation.
        rows = (pairs < count).repeat(2)
        return super().training_step(model, {**inputs, ROWS: rows, SET: drawn}, num_items_in_batch)

    def part_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a part: both must see the same neurons ablated (activation checkpointing)."""
        self.ablated_rows, neurons = inputs[ROWS], self.sets[inputs[SET]]
        inputs = {name: value for name, value in inputs.items() if name not in (ROWS, SET)}
        wanted = self.refresh.kl_weight and bool(self.ablated_rows.any())
        self.teacher = self._intact_hidden(inputs) if wanted else None
        with pruned(self._network, neurons, self.ablated_rows):
            return super().part_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, plus the KL term on the ablated pairs."""
        passed: list[Tensor] = []
        keep = decoder_of(self._network).register_forward_hook(
            lambda module, given, out: passed.append(out.last_hidden_state)
        )
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)  # type: ignore[no-untyped-call]
        finally:
            keep.remove()
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self._log_probabilities(self.teacher)
            got = self._log_probabilities(self._answer_tokens(passed[0][self.ablated_rows], inputs))
            # A part of a micro-batch counts by its share of the pairs; the mean is over the tokens of all of them.
            share = pair_count(inputs) / pair_count(self.whole)
            tokens = self.whole["completion_mask"][self.whole[ROWS], 1:].sum()
            gap = functional.kl_div(got, wanted, reduction="sum", log_target=True) / tokens / share
            self._metrics["train"]["kl"].append(float(gap.detach()))
            loss = loss + self.refresh.kl_weight * gap
        return (loss, outputs) if return_outputs else loss

    @property
    def _network(self) -> PreTrainedModel:
        network: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return network

    @property
    def _file(self) -> Path:
        """Where the sets in force at this step are kept, in the step's checkpoint."""
        return Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / FILE

    def _find_when_due(self) -> None:
        step = self.state.global_step
        if self.found_at < 0 and step > 0:
            self._read(self._file)
        if step % self.refresh.every == 0 and self.found_at != step:
            network = self._network
            network.train(False)
            with self.compute_loss_context_manager():
                self.sets = list(self.refresh.find(replace(self.given, network=network, name="policy")))
            network.train()
            self.found_at = step

    def _generator(self) -> torch.Generator:
        """Depends on the seed, the step and the micro-batch's place in it alone, so that resumed training agrees."""
        step, place = self.turn
        self.turn = (step, place + 1) if step == self.state.global_step else (self.state.global_step, 0)
        draw = hash((self.args.seed, self.accelerator.process_index, *self.turn))
        return torch.Generator().manual_seed(draw % 2**63)

    def _intact_hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Final hidden states of the intact policy at the ablated pairs' answer tokens, ``[token, hidden]``.

        The intact policy is the teacher: no gradient flows into it, so that it is not drawn towards the damage.
        """
        rows, words = self.ablated_rows, ("input_ids", "attention_mask")
        seen = {name: value for name, value in inputs.items() if name not in (*words, *NOT_SEEN)}
        with torch.no_grad(), self.compute_loss_context_manager():
            if seen:
                # Pictures cannot be told apart by rows any more.
                out = run_without_head(self._network, {**{name: inputs[name] for name in words}, **seen})
                return self._answer_tokens(out.last_hidden_state[rows], inputs)
            out = run_without_head(self._network, {name: inputs[name][rows] for name in words})
        return self._answer_tokens(out.last_hidden_state, inputs)

    def _answer_tokens(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Of the ablated rows' hidden states ``[row, token, hidden]`` those that predict an answer's token."""
        return hidden[:, :-1][inputs["completion_mask"][self.ablated_rows, 1:].bool()]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """Of the next token, ``[token, vocabulary]`` in float32."""
        return log_probabilities(self._network, hidden)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        record = {"found_at": self.found_at, "sets": [neurons.to_json() for neurons in self.sets]}
        write_json(self._file, record)

    def _read(self, path: Path) -> None:
        record = read_json(path)
        self.found_at = int(record["found_at"])
        self.sets = [NeuronSet.from_json(neurons) for neurons in record["sets"]]
