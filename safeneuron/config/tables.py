"""The tables of a config that say what is read, measured, selected and reported.

The descriptions are the documentation: ``safeneuron config NAME`` prints them as comments.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from safeneuron.data.catalogue import DATA_SET_NAMES, PROMPT_NAMES
from safeneuron.errors import RenamedSetting

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
STORED_VISION = "eyes"
"""What ``measure.part = "vision"`` is called in files of runs, and was called in configs."""


class SettingsTable(BaseModel):
    """One table of the config; unknown keys are an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


class SourceTable(SettingsTable):
    """Where prompts come from."""

    path: str = Field(
        description="twins:unsafe or twins:safe (bundled), a .jsonl or .csv file, a folder of images (with said), "
        "hub:owner/name, or a benchmark: " + PROMPT_NAMES
    )
    split: str = Field("", description="split of the bundled prompts (discovery, training, test) or of a Hub dataset")
    column: str = Field("", description="column with the prompt; empty finds the usual names")
    every: Count = Field(1, description="use every so-many-th row, for a sample of a file that is sorted by topic")
    count: Count | None = Field(None, description="use the first so many rows; all if not given")
    revision: str = Field("", description="revision of a Hub dataset; give a commit to make the run reproducible")
    where: str = Field("", description="use the rows with this value in this column, as in label = safe")
    category: str = Field("", description="category of all its prompts; over-refusal is reported by category")
    as_image: bool = Field(False, description="draw each prompt as an image, for vision-language models")
    said: str = Field("", description="what is written beside an image; of a folder, the question about each")


class ModelTable(SettingsTable):
    """The table [model]."""

    name: str = Field("embedded", description="embedded, a folder in Hugging Face form, or a name on the Hub")
    revision: str = Field("", description="revision on the Hub; give a commit to make the run reproducible")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of measuring and attacking; auto is bfloat16 where the device computes in it"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; leave it off if you can")
    device_map: Literal["", "auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] = Field(
        "",
        description="auto spreads a model that one device does not hold over the GPUs, main memory and disk, to be "
        "measured and attacked there; or a table of modules and devices; empty: on one device",
    )
    max_memory: dict[str, str] = Field(
        {}, description="device_map: what may be taken of each device, as in { 0 = '70GB', cpu = '200GB' }"
    )
    offload_folder: str = Field(
        "", description="device_map: where weights on disk are written that the checkpoint holds in another form"
    )

    def settings(self) -> dict[str, Any]:
        """What decides the results: where the layers wait until it is their turn does not."""
        return self.model_dump(exclude={"device_map", "max_memory", "offload_folder"})


Sources = tuple[SourceTable, ...]


def _twins(kind: str, split: str) -> Sources:
    return (SourceTable(path=f"twins:{kind}", split=split),)


class DataTable(SettingsTable):
    """The table [data]."""

    unsafe: Sources = Field(_twins("unsafe", "discovery"), description="harmful prompts to find neurons")
    safe: Sources = Field(_twins("safe", "discovery"), description="harmless prompts to find neurons")
    test_unsafe: Sources = Field(_twins("unsafe", "test"), description="harmful prompts of the attack")
    test_safe: Sources = Field(_twins("safe", "test"), description="harmless prompts: over-refusal")


class MeasureTable(SettingsTable):
    """The table [measure]."""

    part: Literal["text", "vision"] = Field(
        "text",
        description="whose neurons: the text decoder's, or vision: those of a vision-language model's vision tower and "
        "projector (only without training, and with prompts that have images)",
    )
    pooling: Literal["last", "mean", "max"] = Field(
        "last", description="one activation vector a prompt: of its last token, or the mean or maximum over its tokens"
    )
    batch_tokens: Count = Field(2048, description="tokens in one forward pass, padding included")
    max_tokens: Count = Field(1024, description="longer prompts are cut to their last so many tokens")

    @field_validator("part", mode="before")
    @classmethod
    def _renamed(cls, part: Any) -> Any:
        if part == STORED_VISION:
            warnings.warn("measure.part = 'eyes' is now called 'vision'; change it", RenamedSetting, stacklevel=2)
            return "vision"
        return part

    @property
    def stored_part(self) -> str:
        """The part as files of runs spell it."""
        return STORED_VISION if self.part == "vision" else self.part

    def settings(self) -> dict[str, Any]:
        """What decides the statistics; without the part where it is the usual one, so that older runs still count."""
        values = self.model_dump(exclude={"part"})
        # Stages of older runs are found again by these values, in which the vision tower has its old name.
        return values if self.part == "text" else {"part": self.stored_part, **values}


class SelectTable(SettingsTable):
    """The table [select]."""

    effect_size: float | None = Field(
        None, description="tau_ES: a neuron with a larger Cohen's d is selected (paper: 3 for Qwen, 2 for Llama)"
    )
    shift: float | None = Field(
        None, description="tau_SAS: a neuron with a larger z-score of its shift is selected (paper: 2)"
    )
    density: float | None = Field(
        None, gt=0, lt=1, description="instead of both thresholds: the share of all neurons to select; default 0.01"
    )

    @model_validator(mode="after")
    def _one_way(self) -> SelectTable:
        by_value = (self.effect_size is not None, self.shift is not None)
        if any(by_value) and (not all(by_value) or self.density is not None):
            raise ValueError("give both effect_size and shift, or density alone")
        return self


class PairSourceTable(SettingsTable):
    """Where preference pairs come from."""

    path: str = Field(description=f"a .jsonl or .csv file, hub:owner/name, or one of {DATA_SET_NAMES}")
    split: str = Field("", description="split of a Hub dataset")
    count: Count | None = Field(None, description="use the first so many pairs; all if not given")
    revision: str = Field("", description="revision of a Hub dataset")
    as_image: bool = Field(False, description="draw each request as an image, for vision-language models")
    said: str = Field("", description="what is written beside an image that is drawn")


class PairsTable(SettingsTable):
    """The table [pairs]."""

    safety: Literal["on-policy"] | tuple[PairSourceTable, ...] = Field(
        "on-policy",
        description="on-policy makes pairs from the prompts below with the model itself; or a list of sources, "
        f"each a file, hub:owner/name or one of {DATA_SET_NAMES}",
    )
    unsafe: Sources = Field(_twins("unsafe", "training"), description="harmful prompts of on-policy pairs")
    safe: Sources = Field(_twins("safe", "training"), description="harmless prompts of on-policy pairs")
    max_new_tokens: Count = Field(128, description="length of the answers generated for on-policy pairs")
    general: Literal["on-policy"] | tuple[PairSourceTable, ...] = Field(
        (),
        description="general pairs to mix in, for example [{ path = 'ultrafeedback-binarized' }]; "
        "on-policy: from the harmless prompts",
    )
    safety_share: float = Field(0.3, gt=0, le=1, description="share of safety pairs when general ones are mixed in")
    count: Count | None = Field(None, description="train on so many pairs at most; all if not given")


class CapabilityTable(SettingsTable):
    """The table [capability]."""

    enabled: bool = Field(
        False, description="measure what the model can do besides, with lm-evaluation-harness (the extra eval)"
    )
    tasks: tuple[Literal["arc_challenge", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"], ...] = Field(
        ("arc_challenge", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"), description="the benchmarks"
    )
    folder: str = Field(
        "",
        description="folder with arc_challenge.jsonl, gsm8k_test.jsonl, TruthfulQA.csv; empty takes all from the Hub",
    )
    limit: int | None = Field(None, ge=2, description="use the first so many questions of each; all if not given")
    shots: int | None = Field(
        None, ge=0, description="solved examples before a question; if not given 25 for ARC, 5 for GSM8K; TruthfulQA: 0"
    )
    pruned: bool = Field(False, description="measure each state also with its own safety neurons (FULL) pruned")
    chat_template: bool = Field(False, description="put questions and examples through the model's chat template")
    batch_size: Count = Field(4, description="questions, each with one answer, in one forward pass")

    @model_validator(mode="after")
    def _some_task(self) -> CapabilityTable:
        if self.enabled and not self.tasks:
            raise ValueError("enabled = true needs at least one of the tasks; name one, or leave tasks out for all")
        return self


class ReportTable(SettingsTable):
    """The table [report]."""

    examples: int = Field(3, ge=0, description="harmful prompts whose answers the report shows for each state")
    show_text: bool = Field(False, description="show the answers in the report; by default they are masked")
