"""Prompts with answers through a model: as tokens, as batches, forward and back, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.forward import length_batches, over_ranks
from safeneuron.models.model import Model
from safeneuron.models.vision import run_without_head
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import Halving
from safeneuron.runtime.offloading import require_whole
from safeneuron.runtime.progress import Progress


@dataclass(frozen=True)
class Exchange:
    """A prompt with an answer to it, as tokens: the first ``prompt`` of ``ids`` are the prompt's."""

    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """Exchanges as tensors, padded on the right, where causal attention cannot see the padding.

    ``answer`` is boolean ``[row, token]``, true at the tokens of answers;
    ``ends`` is ``[row]``, how many tokens the prompt of each row has; ``inputs`` is what the model is given: ids and
    mask, and the pictures, which all rows have or none.
    """

    inputs: dict[str, Tensor]
    answer: Tensor
    ends: Tensor

    @property
    def ids(self) -> Tensor:
        """Token ids ``[row, token]``."""
        return self.inputs["input_ids"]

    @property
    def mask(self) -> Tensor:
        """Where there are tokens, ``[row, token]``."""
        return self.inputs["attention_mask"]

    @staticmethod
    def of(model: Model, exchanges: Sequence[Exchange]) -> Batch:
        """The exchanges in order, one a row."""
        inputs = model.inputs([exchange.ids for exchange in exchanges], "right")
        mask = inputs["attention_mask"]
        ends = torch.tensor([exchange.prompt for exchange in exchanges], device=model.device)
        places = torch.arange(mask.shape[1], device=model.device)
        return Batch(inputs, (places >= ends[:, None]) & (mask > 0), ends)


def exchanges_of(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[str], max_tokens: int = 1024
) -> list[Exchange]:
    """Each prompt, through the chat template, with the answer of the same number.

    Args:
        model: Whose template and tokenizer.
        prompts: At least one.
        answers: As many.
        max_tokens: A prompt is cut to its last so many tokens, an answer to its first.

    Returns:
        Tokens, in the order of the prompts.

    Raises:
        InputError: For more or fewer answers than prompts, for none, and for an answer that has no token.
    """
    if len(prompts) != len(answers) or not prompts:
        raise InputError(
            f"each prompt needs one answer, and at least one is needed; found {len(prompts)} prompts and "
            f"{len(answers)} answers"
        )
    exchanges = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = model.ask(prompt, max_tokens)
        end = list(model.tokenizer(answer, add_special_tokens=False)["input_ids"])[:max_tokens]
        if not end:
            raise InputError(f"the answer to {prompt.text[:60]!r} is empty; expected text, leave the prompt out")
        exchanges.append(Exchange(start + end, len(start)))
    return exchanges


def prompts_alone(model: Model, prompts: Sequence[Prompt], max_tokens: int = 1024) -> list[Exchange]:
    """Each prompt through the chat template, cut to its last ``max_tokens`` tokens, without an answer."""
    encoded = [model.ask(prompt, max_tokens) for prompt in prompts]
    return [Exchange(ids, len(ids)) for ids in encoded]


def total_over_batches(
    exchanges: Sequence[Exchange],
    work: Callable[[Sequence[Exchange]], Tensor],
    batch_tokens: int,
    progress: Progress | None = None,
) -> Tensor:
    """The sum over all batches of what ``work`` makes of each.

    Memory is that of one batch and of two such tensors. Several ranks take the batches in turn, and all get the sum
    over all of them; so all must call it. A batch that does not fit into memory is run in halves.

    Args:
        exchanges: At least one.
        work: Takes some exchanges through a model; gives tensors of one shape, on the CPU, which add up.
        batch_tokens: Tokens in one batch, padding included.
        progress: Called after each batch.

    Returns:
        The sum, of the shape of each tensor.

    Raises:
        InputError: If the sum is not finite.
        ValueError: If there are no exchanges.
    """
    advice = "use a smaller batch_tokens, shorter prompts, or a device with more memory"
    halving: Halving[Exchange] = Halving(
        "the pass", advice, lambda part: len(part) * max(len(exchange.ids) for exchange in part)
    )
    total: Tensor | None = None
    done = 0
    for number, batch in enumerate(length_batches([exchange.ids for exchange in exchanges], batch_tokens)):
        # With fewer batches than ranks some have no part in it; they still need a tensor to add, so they run the first.
        mine = number % distributed.world() == distributed.rank()
        if mine or number == 0:
            for values in halving.over([exchanges[index] for index in batch], work):
                share = values if mine else torch.zeros_like(values)
                total = share if total is None else total.add_(share)
        done += len(batch)
        if progress is not None:
            progress(done, len(exchanges))
    if total is None:
        raise ValueError("there is no exchange to sum over; give at least one")
    whole = over_ranks(total)
    if not torch.isfinite(whole).all():
        raise InputError(
            "the model's activations or gradients are not finite on these prompts; load it with dtype = 'float32', or "
            "use another checkpoint"
        )
    return whole


def run_decoder(model: Model, batch: Batch) -> None:
    """One pass through the decoder without the LM head and without gradients, for what is recorded meanwhile."""
    with torch.inference_mode():
        run_without_head(model.network, batch.inputs)


def run_backward(model: Model, batch: Batch) -> None:
    """One pass through the model and back from the loss, for the gradients that hooks on activations see meanwhile.

    The loss is the sum over the rows of the mean negative log-likelihood of each one's answer, so that each row's
    gradients are those of a row alone. No gradient of a weight is computed, and ``.grad`` of none is touched.

    Args:
        model: The model; its weights are all in memory.
        batch: Prompts with answers.

    Raises:
        InputError: For a model of which weights are offloaded: the way back would hold all of them at once.
    """
    require_whole(model.network, "a pass back from the loss")
    with torch.enable_grad(), _leaf_of_embeddings(model) as leaves:
        out = run_without_head(model.network, batch.inputs)
        predicting = batch.answer[:, 1:]
        wanted = batch.ids[:, 1:][predicting]
        predicted = log_probabilities(model.network, out.last_hidden_state[:, :-1][predicting])
        weights = (1 / predicting.sum(dim=1))[:, None].expand(predicting.shape)[predicting]
        loss = (functional.nll_loss(predicted, wanted, reduction="none") * weights).sum()
        torch.autograd.grad(loss, leaves[0])


@contextmanager
def _leaf_of_embeddings(model: Model) -> Iterator[list[Tensor]]:
    """Within the block gradients flow back to what the decoder is given, words and pictures, which is put in the list.

    Not into the vision tower, nor into the embeddings.
    """
    leaves: list[Tensor] = []
    embed = cast("Callable[[Tensor], Tensor]", model.network.get_input_embeddings())

    def cut(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        words = named.pop("input_ids", None)
        embedded = named.pop("inputs_embeds", None)
        start = embed(words) if embedded is None else embedded
        leaves.append(start.detach().requires_grad_(True))
        return given, {**named, "inputs_embeds": leaves[0]}

    handle = decoder_of(model.network).register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield leaves
    finally:
        handle.remove()


def log_probabilities(network: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Log-probabilities of the next token, as the model's own head gives them, its cap on logits included.

    Args:
        network: The network, for its LM head and config.
        hidden: Final hidden states ``[token, hidden]``.

    Returns:
        ``[token, vocabulary]`` float32.
    """
    logits = network.get_output_embeddings()(hidden).float()  # type: ignore[operator]
    cap = vars(network.config.get_text_config()).get("final_logit_softcapping")  # type: ignore[union-attr, operator]
    capped: Tensor = logits if cap is None else cap * (logits / cap).tanh()
    return capped.log_softmax(-1)


def common_ending(model: Model) -> int:
    """How many tokens the template puts after every request: its end, and what opens the answer; at least 1."""
    first, second = (model.encode([{"role": "user", "content": text}]) for text in ("apples", "What is 7 + 5?"))
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return max(1, count)
