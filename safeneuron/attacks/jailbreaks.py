"""Attempts at a model other than pruning: a change of the model, of the request, or of how the answer opens.

All three kinds share one seam: a block to enter, a way to put the request, and the words that the answer is made to
begin with. So an attack is the same whatever it does, ``with attempt.block(model): respond(model, ..., attempt)``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from safeneuron.errors import InputError, did_you_mean
from safeneuron.models.model import Model
from safeneuron.models.vllm import Server

ModelContext = Callable[[Model], AbstractContextManager[object]]
PLACE = "{request}"
"""Where a template takes the request in."""


def _untouched(model: Model) -> AbstractContextManager[object]:
    """The block of an attempt that leaves the model as it is."""
    return nullcontext()


@dataclass(frozen=True)
class Attempt:
    """One way to attack a model; without more than a name it only asks.

    Args:
        name: Its name in reports.
        block: Makes the context in which the model is attacked, and leaves it bit-identical.
        template: What the request is put into, at ``PLACE``.
        encoding: How the request is encoded: not at all, or ``base64``.
        opening: What the answer is made to begin with, which is part of the response and judged with it.
        technique: For reports.
        source: For reports.

    Raises:
        InputError: For a template without a place for the request, an unknown encoding, or an opening with white space
            around it, after which a model would have to go on with tokens that it never uses there.
    """

    name: str
    block: ModelContext = _untouched
    template: str = PLACE
    encoding: str = ""
    opening: str = ""
    technique: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if PLACE not in self.template:
            raise InputError(f"the template of {self.name!r} has no {PLACE}, found {self.template[:60]!r}; add it")
        if self.encoding not in ("", "base64"):
            raise InputError(f"the encoding {self.encoding!r} of {self.name!r} is unknown; expected base64 or none")
        if self.opening != self.opening.strip():
            raise InputError(
                f"the opening of {self.name!r} must not begin or end with white space, found {self.opening!r}; leave "
                "it out, since the model writes it with its next word"
            )

    def asked(self, request: str) -> str:
        """The request as this attempt puts it to the model."""
        if self.encoding == "base64":
            request = base64.b64encode(request.encode()).decode()
        return self.template.replace(PLACE, request)

    def encode(
        self, model: Model | Server, requests: Sequence[str], pictures: Sequence[Any] = ()
    ) -> tuple[list[list[int]], int]:
        """Token ids of each conversation, up to the end of the opening.

        The tokens of the opening follow those of the generation prompt, so that before the answer the model reads
        exactly what it reads without it.

        Args:
            model: Whose tokenizer and chat template are used.
            requests: What is asked.
            pictures: The picture of each request, or None; none at all if empty.

        Returns:
            The ids of each conversation, and how many of the last ones are the opening.
        """
        opening = list(model.tokenizer(self.opening, add_special_tokens=False)["input_ids"]) if self.opening else []
        conversations = [[{"role": "user", "content": self.asked(request)}] for request in requests]
        shown = pictures or [None] * len(requests)
        encoded = [model.encode(messages, picture) for messages, picture in zip(conversations, shown, strict=True)]
        return [ids + opening for ids in encoded], len(opening)


def input_attempts(*names: str) -> list[Attempt]:
    """The bundled attempts at the input: prefilled openings and classical jailbreak templates.

    They are short, generic and long known (Wei et al. 2023, arXiv:2307.02483); each names its source.

    Args:
        *names: Those that are wanted, in this order; all if there are none.

    Raises:
        InputError: For a name that there is not.
    """
    text = (files("safeneuron.attacks") / "bundled" / "jailbreaks.jsonl").read_text("utf-8")
    known = {record["name"]: Attempt(**record) for record in map(json.loads, text.splitlines())}
    for name in names:
        if name not in known:
            raise InputError(f"there is no attempt {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
