"""What the guard models share: loading, prompts without special tokens, batches, and what a network writes next."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from safeneuron.errors import InputError
from safeneuron.evaluation.judge import check_lengths, readable
from safeneuron.runtime.devices import Halving

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SPECIAL_TOKEN = re.compile(
    r"<\|[a-z0-9_]{1,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>", re.IGNORECASE
)
_LONGEST = 20_000  # characters of a text that are tokenized at all


def without_special_tokens(text: str) -> str:
    """The text without control characters and without anything that a guard's tokenizer may take for its own token."""
    text, before = readable(text[:_LONGEST]), ""
    while text != before:  # taking one out may put the halves of another together
        text, before = _SPECIAL_TOKEN.sub("", text), text
    return text


def judge_prompt(name: str) -> str:
    """The text of a prompt of ``judge_prompts``, without its last line break."""
    return (files("safeneuron.evaluation") / "prompts" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


class Guard(ABC):
    """What all guards share: a network in evaluation mode, greedy and in batches, and its tokenizer.

    A guard says how its prompt is rendered (``text_of``) and what a response is (``verdicts``). ``longest`` is how many
    tokens of a response it reads, its first ones.
    """

    name: str = "guard"
    longest = 2048
    adds_special_tokens = True

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise InputError(f"the guard's batch_size must be at least 1, found {batch_size}")
        self.network = network
        self.network.train(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._halving: Halving[list[int]] = Halving("judging", "use a smaller judge, or a device with more memory")

    @classmethod
    def load(cls, name: str, device: str = "auto", dtype: str = "auto", batch_size: int = 8) -> Any:
        """Load the guard by Hub name or folder.

        The device "auto" spreads the network over all GPUs, or puts it on the CPU if there is none. Raises
        ``InputError`` if the guard cannot be found or read; the weights of most are gated by a licence.
        """
        network, tokenizer = load_network(name, device, dtype)
        return cls(network, tokenizer, batch_size)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        """One verdict a response. Raises ``InputError`` if there are more or fewer prompts than responses."""
        check_lengths(prompts, responses)
        return self.verdicts(prompts, responses)

    @abstractmethod
    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        """One verdict a response, for lists of the same length."""

    @abstractmethod
    def text_of(self, prompt: str, response: str) -> str:
        """What the guard reads to judge a response."""

    def shortened(self, response: str) -> str:
        """What the guard reads of a response: its first ``longest`` tokens, as text."""
        return self.beginning(response)

    def beginning(self, text: str) -> str:
        """The first ``longest`` tokens of a text, as text."""
        text = without_special_tokens(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= self.longest else str(self.tokenizer.decode(ids[: self.longest]))

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self.tokenizer(text, add_special_tokens=self.adds_special_tokens)["input_ids"]) for text in texts]

    def _texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        pairs = zip(prompts, responses, strict=True)
        return [self.text_of(self.beginning(prompt), self.shortened(text)) for prompt, text in pairs]

    def _in_batches(self, rows: list[list[int]], work: Callable[[Sequence[list[int]]], list[Any]]) -> list[Any]:
        results: list[Any] = []
        for start in range(0, len(rows), self.batch_size):
            parts = self._halving.over(rows[start : start + self.batch_size], work)
            results += [result for part in parts for result in part]
        return results

    def _padded(self, rows: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """Tokens and mask ``[row, token]`` on the network's device."""
        from safeneuron.models.model import pad, padding_token

        return pad(rows, padding_token(self.network, self.tokenizer) or 0, side, self.network.device)

    def generate(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What the guard writes after each text, greedily, special tokens left out."""
        from safeneuron.models.model import generate_texts, generation_settings

        settings = generation_settings(self.network, self.tokenizer, max_new_tokens)

        def work(rows: Sequence[list[int]]) -> list[str]:
            tokens, mask = self._padded(rows, "left")
            inputs = {"input_ids": tokens, "attention_mask": mask}
            return generate_texts(self.network, self.tokenizer, inputs, settings)

        return self._in_batches(self._rows(texts), work)

    def next_token(self, texts: Sequence[str]) -> Tensor:
        """How likely each token is to come after each text, ``[text, token]``, float32.

        Rows are padded on the right, where causal attention cannot see the padding.
        """
        import torch

        def work(rows: Sequence[list[int]]) -> list[Tensor]:
            tokens, mask = self._padded(rows, "right")
            last = mask.sum(dim=1).cpu() - 1  # places on the CPU fit networks that are spread over several devices
            places, which = last.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            with torch.inference_mode():
                # The head is run only where some row ends: over all places its output would dwarf the network.
                logits = self.network(
                    input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=places
                ).logits
            return list(logits[torch.arange(len(rows)), which].float().softmax(dim=-1).cpu())

        probabilities = self._in_batches(self._rows(texts), work)
        return torch.stack(probabilities) if probabilities else torch.zeros(0, len(self.tokenizer))

    def token(self, word: str) -> int:
        """The id of a word that is one token. Raises ``InputError`` if the tokenizer has none."""
        number = self.tokenizer.convert_tokens_to_ids(word)
        if not isinstance(number, int) or number == self.tokenizer.unk_token_id:
            raise InputError(f"the guard {self.name} has no token {word!r}; give the model that this judge is made for")
        return number


def load_network(name: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A guard's network and tokenizer, by Hub name or folder. Raises ``InputError`` if they cannot be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        network = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the guard model {name!r} cannot be loaded ({reason}); accept its licence on its Hub page and log in "
            "with `hf auth login`, or give the folder that holds it"
        ) from error
    return network, tokenizer
