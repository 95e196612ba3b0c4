"""The settings of a run as a whole: its tables, what must fit between them, and mistakes in them as one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from safeneuron.config.align import AlignTable
from safeneuron.config.attack import AttackTable, JudgeTable
from safeneuron.config.tables import (
    CapabilityTable,
    DataTable,
    MeasureTable,
    ModelTable,
    PairsTable,
    ReportTable,
    SelectTable,
    SettingsTable,
)  # fmt: skip
from safeneuron.errors import did_you_mean


class Config(SettingsTable):
    """Everything that decides the results of a run."""

    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="name of the run and of its folder under runs/")
    seed: int = Field(0, ge=0, description="of the training order, the refusals chosen and the random controls")
    model: ModelTable = Field(default_factory=ModelTable, description="the model as given: T0")
    data: DataTable = Field(default_factory=DataTable, description="prompts; each entry is a list of sources")
    measure: MeasureTable = Field(default_factory=MeasureTable, description="activation statistics (Eq. 1-4)")
    select: SelectTable = Field(default_factory=SelectTable, description="safety neurons (Eq. 5-10)")
    pairs: PairsTable = Field(default_factory=PairsTable, description="preference pairs")
    align: AlignTable = Field(default_factory=AlignTable, description="preference optimisation (Eq. 11-13)")
    attack: AttackTable = Field(default_factory=AttackTable, description="pruning attacks")
    judge: JudgeTable = Field(default_factory=JudgeTable, description="verdicts on the answers")
    capability: CapabilityTable = Field(
        default_factory=CapabilityTable, description="benchmarks of capability, off unless enabled"
    )
    report: ReportTable = Field(default_factory=ReportTable, description="tables and figures")
    variants: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], dict[str, Any]] = Field(
        {}, description="further trainings from T0, each a table of the keys of [align] that it changes"
    )

    @model_validator(mode="after")
    def _variants_hold(self) -> Config:
        for name in self.variants:
            try:
                self.variant(name)
            except ValidationError as error:
                raise ValueError(sentence_of(error, f"[variants.{name}]")) from error
        return self

    @model_validator(mode="after")
    def _vision_is_not_trained(self) -> Config:
        if self.measure.part == "text":
            return self
        if self.align.rounds or self.variants:
            raise ValueError(
                "the vision tower stays as it is in training, so that its neurons cannot be frozen; with measure.part "
                "= 'vision' set align.rounds = 0 and variants = {}"
            )
        if self.measure.pooling == "last":
            raise ValueError("images have no last token; with measure.part = 'vision' set measure.pooling to 'mean'")
        of_text = {
            "attack.selectors": self.attack.selectors,
            "attack.knowledge = 'iterated'": "iterated" in self.attack.knowledge,
            "attack.backend = 'vllm'": self.attack.backend == "vllm",
        }
        if any(of_text.values()):
            name = next(name for name, wanted in of_text.items() if wanted)
            raise ValueError(f"{name} is for neurons of the text decoder; leave it out with measure.part = 'vision'")
        return self

    @model_validator(mode="after")
    def _spread_models_are_not_changed(self) -> Config:
        if not self.model.device_map:
            return self
        attack = self.attack
        needing_weights = {
            "align.rounds > 0": any(self.variant(name).rounds for name in ["", *self.variants]),
            "snip or gradient in attack.selectors": bool({"snip", "gradient"} & set(attack.selectors)),
            "fine-tune in attack.attempts": "fine-tune" in attack.attempts,
            'attack.backend = "vllm"': attack.backend == "vllm",
        }
        if named := [name for name, wanted in needing_weights.items() if wanted]:
            raise ValueError(
                "model.device_map is for measuring and attacking, but all weights in memory are needed for "
                f"{', '.join(named)}; leave out the one or the other"
            )
        return self

    def variant(self, name: str) -> AlignTable:
        """The [align] table of a variant; the empty name is the main one."""
        if not name:
            return self.align
        changes = self.variants[name]
        unknown = [key for key in changes if key not in AlignTable.model_fields]
        if unknown:
            known = AlignTable.model_fields
            raise ValueError(
                f"[variants.{name}] has the unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}; known here: "
                f"{', '.join(known)}"
            )
        return AlignTable.model_validate({**self.align.model_dump(), "label": "", **changes})


def sentence_of(error: ValidationError, origin: str, table: type[BaseModel] = Config) -> str:
    """The mistake in the values of a table as one sentence.

    Args:
        error: What pydantic says.
        origin: Where the values are from; the sentence begins with it.
        table: The table that was to be made of them.
    """
    # Where a value may have one of several forms, the error deepest inside is about the form that was meant.
    deepest = max(error.errors(), key=lambda detail: len(detail["loc"]))
    where = [str(part) for part in deepest["loc"] if not str(part).startswith(("tuple[", "literal[", "[key]"))]
    name = ".".join(where)
    if deepest["type"] == "extra_forbidden":
        known = _known_keys(table, where[:-1])
        return f"{origin} has the unknown key {name!r}{did_you_mean(where[-1], known)}; known here: {', '.join(known)}"
    if deepest["type"] == "missing":
        return f"{origin} lacks the key {name!r}; give it a value"
    if deepest["type"] == "value_error":
        return f"{origin}: {name + ': ' if name else ''}{deepest['ctx']['error']}"
    in_toml = {"model_type": "it should be a table", "dict_type": "it should be a table", "tuple_type": "use a list"}
    reason = in_toml.get(deepest["type"], deepest["msg"][0].lower() + deepest["msg"][1:])
    return f"{origin}: {name} = {deepest['input']!r} cannot be used: {reason}"


def _known_keys(table: type[BaseModel], names: Sequence[str]) -> list[str]:
    """The keys of the table at this place, following lists of tables too."""
    for name in names:
        field = table.model_fields.get(name)
        if field is not None:
            table = next(_tables_in(field.annotation), table)
    return list(table.model_fields)


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _tables_in(part)
