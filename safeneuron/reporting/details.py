"""What a report shows beside the results: the answers, the strongest neurons, further figures, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer:
    """One answer of one attacked state: text from a stranger."""

    state: str
    set: str
    knowledge: str
    kind: str
    """Kind of request: harmful or benign."""
    index: int
    """Place of the request among those of its kind."""
    prompt: str
    image: str = ""
    response: str
    verdict: str


class StrongNeuron(NamedTuple):
    """A neuron of large effect size or shift, and which criterion found it: 1 ES, 2 SAS, 3 both."""

    layer: int
    channel: int
    width: int
    d: float
    z: float
    criteria: int


@dataclass(frozen=True)
class StageCost:
    """Seconds and peak memory (MB; None if not known) of a finished stage."""

    stage: str
    seconds: float
    peak_memory_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How the results of a run were made: command, versions, settings, and what each stage took."""

    command: str
    version: str
    """Of safeneuron."""
    versions: Mapping[str, str]
    """Of Python, the device, the platform and the libraries."""
    created: str
    config_toml: str
    stages: Sequence[StageCost]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Details:
    """What the page shows beside the results: all answers, the strongest neurons of each state, further figures.

    ``analysis`` is SVG text by title.
    """

    responses: Sequence[JudgedAnswer] = ()
    neurons: Mapping[str, Sequence[StrongNeuron]] = field(default_factory=dict)
    analysis: Mapping[str, str] = field(default_factory=dict)
