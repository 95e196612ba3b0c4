"""Parts of a state's results that are read as they stand: neurons, training, capability, agreement, differences.

The attacks, and everything that is computed from them, stand in ``results``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from safeneuron.errors import InputError

T = TypeVar("T")
# A key that files of earlier versions lack: None where it is absent, and then not written either.
Later = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
DESCRIBED = ConfigDict(use_attribute_docstrings=True)
"""What stands under a field describes it in the JSON schema."""


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Number of neurons of each set in each layer."""

    __pydantic_config__ = DESCRIBED

    es: Annotated[tuple[int, ...], Field(alias="ES")]
    sas: Annotated[tuple[int, ...], Field(alias="SAS")]
    full: Annotated[tuple[int, ...], Field(alias="FULL")]


@dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """The safety neurons that were found on one state."""

    __pydantic_config__ = DESCRIBED

    effect_size_threshold: float
    shift_threshold: float
    significant: int
    """Neurons significantly more active on harmful prompts (false-discovery rate 5 %)."""
    es: Annotated[int, Field(alias="ES")]
    """Neurons chosen by effect size."""
    sas: Annotated[int, Field(alias="SAS")]
    """Neurons chosen by activation shift."""
    full: Annotated[int, Field(alias="FULL")]
    """Neurons chosen by either."""
    density: float
    """Share of all neurons that FULL is."""
    jaccard_with_t0: Annotated[float, Field(alias="jaccard_with_T0")]
    """Jaccard index of FULL with that of T0."""
    per_layer: LayerCounts


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How one state was trained, and the proof that its frozen neurons stayed."""

    __pydantic_config__ = DESCRIBED

    freeze: str
    """Which neurons were frozen: safety, random, none or all-but-safety."""
    ablate: bool
    """Whether safety neurons were zero in some of the steps."""
    refresh: Later[int] = None
    """Steps after which the safety neurons were found again; 0 for never."""
    quantise: Later[str] = None
    frozen: int
    """Number of frozen neurons."""
    frozen_identical: bool
    """Whether all of their weights are bit-identical to those before the training."""
    frozen_sha256: Later[str] = None
    free_change: float
    """Relative change (L2) of all parameters that were free to move."""
    steps: int
    pairs: int
    """Preference pairs."""


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One line of the log of a training."""

    __pydantic_config__ = DESCRIBED

    step: int
    loss: Later[float] = None
    accuracy: Later[float] = None
    """Share of pairs in which the chosen answer has the higher reward."""
    margin: Later[float] = None
    """Reward of the chosen answer minus that of the rejected one."""
    grad_norm: Later[float] = None
    learning_rate: Later[float] = None
    padding: Later[float] = None
    """Share of tokens that are padding."""


@dataclass(frozen=True, kw_only=True)
class CapabilityScore:
    """One score of a capability benchmark."""

    __pydantic_config__ = DESCRIBED

    task: Later[str] = None
    source: Later[str] = None
    """Where the questions came from: files or Hub."""
    shots: Later[int] = None
    """Examples before each question."""
    n: int
    """Questions."""
    metric: Later[str] = None
    value: float
    stderr: float
    """Standard error of ``value``."""
    metrics: Later[Mapping[str, tuple[float, float]]] = None
    """All metrics of the harness, each with its standard error."""


@dataclass(frozen=True, kw_only=True)
class Kappa:
    """Raw agreement of two judges and Cohen's kappa; None where there is none."""

    __pydantic_config__ = DESCRIBED

    agreement: float | None
    kappa: float | None


@dataclass(frozen=True, kw_only=True)
class VerdictPair:
    """How often the two judges gave these two verdicts."""

    __pydantic_config__ = DESCRIBED

    verdicts: tuple[str, str]
    n: int


@dataclass(frozen=True, kw_only=True)
class JudgeAgreement:
    """How far two judges agree on the answers of a state."""

    __pydantic_config__ = DESCRIBED

    judges: tuple[str, str]
    n: int
    """Answers on which both had an opinion."""
    cannot_say: int
    agreement: float | None
    kappa: float | None
    complied: Kappa
    refused: Kappa
    counts: tuple[VerdictPair, ...]


@dataclass(frozen=True, kw_only=True)
class StateDifference:
    """Two states on the same requests: the share of each, the paired difference, and McNemar's exact test."""

    __pydantic_config__ = DESCRIBED

    first: str
    second: str
    state: Later[str] = None
    """Where runs are compared: the state of both; first and second are the runs."""
    kind: str
    """Kind of request: harmful or benign."""
    verdict: str
    """The outcome that is compared."""
    set: str
    knowledge: str
    n: int
    """Requests on which both could be judged."""
    first_rate: float
    second_rate: float
    gained: int
    """Requests on which only the second has the outcome."""
    lost: int
    """Requests on which only the first has it."""
    difference: float
    """Second minus first."""
    low: float
    high: float
    p: float
    p_corrected: float
    """``p`` among all tests of the list (Holm)."""


def adapter_of(form: Any) -> TypeAdapter[Any]:
    """What reads, writes and describes records of this form, made once."""
    return _adapter(form)


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def read_record(form: type[T], record: object) -> T:
    """A record of the given form from JSON values; keys that it does not know are left out.

    Args:
        form: One of the dataclasses of ``records`` and ``results``.
        record: What a file holds.

    Raises:
        InputError: If a key is missing, or a value is of another kind.
    """
    try:
        checked: T = adapter_of(form).validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"a record of the run has not the form that it should have, at {place} ({first['msg']}); it may be "
            "damaged, make its stage again with --redo"
        ) from error
    return checked


def write_record(record: object) -> dict[str, Any]:
    """The JSON object of a record: the same keys in the same order, floats to the bit."""
    written: dict[str, Any] = adapter_of(type(record)).dump_python(record, mode="json", by_alias=True)
    return written
