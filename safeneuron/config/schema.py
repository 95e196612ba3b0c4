"""The settings of a run: each field with its meaning, default and range; read from TOML, written with comments.

The descriptions below are the documentation: ``safeneuron config NAME`` prints them as comments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safeneuron.data.catalogue import DATA_SET_NAMES, PROMPT_NAMES
from safeneuron.errors import did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
AttemptName = Literal[
    "direction", "fine-tune", "prefill-sure", "prefill-steps", "prefix-injection", "refusal-suppression", "role-play",
    "hypothetical", "translation", "base64",
]  # fmt: skip


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

    part: Literal["text", "eyes"] = Field(
        "text",
        description="whose neurons: the text decoder's, or those of a vision-language model's eyes, its vision tower "
        "and projector (only without training, and with prompts that have images)",
    )
    pooling: Literal["last", "mean", "max"] = Field(
        "last", description="one activation vector a prompt: of its last token, or the mean or maximum over its tokens"
    )
    batch_tokens: Count = Field(2048, description="tokens in one forward pass, padding included")
    max_tokens: Count = Field(1024, description="longer prompts are cut to their last so many tokens")

    def settings(self) -> dict[str, Any]:
        """What decides the statistics; without the part where it is the usual one, so that older runs still count."""
        return self.model_dump(exclude={"part"} if self.part == "text" else None)


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


class AlignTable(SettingsTable):
    """The table [align], and what a variant may change."""

    label: str = Field("", description="what the report calls the aligned states; empty describes the settings")
    rounds: int = Field(1, ge=0, description="rounds T1, T2, ...; each freezes all neurons found so far")
    stop_early: bool = Field(
        False, description="no further round once the strongest adaptive attack gains nothing beyond its interval"
    )
    freeze: Literal["safety", "random", "none", "all-but-safety"] = Field(
        "safety",
        description="safety: the method; random: a control of the same size; none: plain DPO; "
        "all-but-safety: train nothing but the safety neurons (SN-Tune)",
    )
    ablate: bool = Field(False, description="also zero the safety neurons in the policy's forward passes (Algorithm 1)")
    ablate_share: float = Field(1.0, gt=0, le=1, description="share of the optimizer steps in which they are zero")
    ablate_reference: bool = Field(False, description="zero them in the reference too; only with ablate_share = 1")
    refresh: int = Field(
        0,
        ge=0,
        description="find the running model's neurons again every so many steps and ablate those; 0: never",
    )
    refresh_share: float = Field(0.5, gt=0, le=1, description="share of each batch in which they are zero")
    refresh_searches: Count = Field(1, description="also those of so many searches, each with the earlier finds pruned")
    refresh_prompts: int = Field(64, ge=2, description="prompts of each class that a search uses, drawn at random")
    kl_weight: float = Field(0.1, ge=0, description="refresh: weight of KL(intact || ablated) beside DPO's loss")
    beta: Positive = Field(0.1, description="strength of DPO's tie to the reference")
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the chosen answers' negative log-likelihood beside DPO's loss (paper: none)"
    )
    learning_rate: Positive = Field(5e-6, description="peak learning rate of AdamW, with a cosine schedule")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay")
    epochs: Positive = Field(3.0, description="passes over the pairs")
    batch_size: Count = Field(16, description="pairs in one optimizer step, those of all processes together")
    micro_batch_size: Count = Field(4, description="pairs in one forward pass; batch_size is a multiple of it")
    warmup_share: Fraction = Field(0.1, description="share of the steps in which the learning rate rises")
    max_length: Count = Field(1024, description="longest conversation in tokens; longer ones are cut at the end")
    bucketing: bool = Field(True, description="pairs of like length share a forward pass, so that little is padding")
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")
    freeze_routers: bool = Field(
        False, description="mixtures of experts: also freeze what decides which experts a token goes to"
    )
    gradient_checkpointing: bool = Field(False, description="trade time for memory")
    fit_memory: bool = Field(
        True,
        description="where training would not fit into memory, fewer pairs at a time, then gradient checkpointing; "
        "neither changes the results but by rounding",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="0 trains all weights; above, LoRA adapters of this rank; they want ten times the learning rate",
    )
    lora_alpha: Count = Field(32, description="the adapters are scaled by lora_alpha / lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    lora_targets: Literal["ffn", "attention", "ffn+attention"] = Field(
        "ffn+attention", description="the linear layers that get an adapter"
    )
    quantise: Literal["none", "4bit"] = Field(
        "none", description="4bit trains the adapters on weights in 4 bits (QLoRA); the aligned model is not quantised"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of computing; the weights being trained are always float32"
    )
    save_every: int = Field(50, ge=0, description="steps between checkpoints for resuming; 0 for none")

    @model_validator(mode="after")
    def _one_ablation(self) -> AlignTable:
        if self.ablate and self.refresh:
            raise ValueError("ablate takes the neurons found before training, refresh those found meanwhile; use one")
        if self.ablate_reference and (not self.ablate or self.ablate_share < 1):
            raise ValueError("ablate_reference needs ablate = true and ablate_share = 1")
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> AlignTable:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_on_quantised_weights(self) -> AlignTable:
        if self.quantise != "none" and not self.lora_rank:
            raise ValueError(f"weights in {self.quantise} cannot be trained themselves; give a lora_rank, such as 16")
        if self.quantise != "none" and self.rounds > 1:
            raise ValueError(
                f"each round would quantise the neurons anew that an earlier one has frozen, and so change them; use "
                f"rounds = 1 with quantise = {self.quantise!r}, or lora_rank without quantise"
            )
        return self


class AttackTable(SettingsTable):
    """The table [attack]."""

    max_new_tokens: Count = Field(128, description="length of each answer")
    batch_size: Count = Field(32, description="answers generated side by side")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="who generates: transformers, or vLLM on a GPU from a checkpoint written for each attack; attacks "
        "that weights cannot hold stay with transformers",
    )
    sets: tuple[Literal["ES", "SAS", "FULL"], ...] = Field(("ES", "SAS", "FULL"), description="neuron sets to prune")
    knowledge: tuple[Literal["static", "adaptive", "iterated"], ...] = Field(
        ("static", "adaptive"),
        description="static prunes T0's neurons, adaptive those of the attacked state itself, iterated finds again "
        "after each pruning and prunes all of them",
    )
    searches: int = Field(5, ge=2, description="how often the iterated attacker finds and prunes")
    random: bool = Field(True, description="also prune a random set of the same size in every layer, as a control")
    over_refusal: Literal["always", "unpruned", "never"] = Field(
        "always",
        description="when to answer the harmless test prompts too: under every pruning, with none, or not at all",
    )
    curve: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), description="densities at which to prune the top-scored neurons, for the attack curve"
    )
    selectors: tuple[Literal["probe", "snip", "wanda", "gradient", "twins", "contrast"], ...] = Field(
        (),
        description="rival attackers, who each prune as many neurons as FULL adaptive, found on the attacked state in "
        "their own way (docs/attacks.md); contrast compares a trained state with T0",
    )
    selector_prompts: int = Field(64, ge=2, description="prompts of each class that a rival uses, drawn at random")
    operators: tuple[Literal["mean", "opposite"], ...] = Field(
        (),
        description="what else than zero becomes of the state's own FULL neurons: their mean on harmless prompts, or "
        "minus their mean on harmful ones",
    )
    transfer: str = Field("", description="a file with neurons of another model of the same shape, pruned here too")
    attempts: tuple[AttemptName, ...] = Field(
        (),
        description="attacks other than pruning (docs/red-teaming.md): direction and fine-tune change the model, the "
        "others the request or how the answer begins",
    )
    fine_tune_steps: Count = Field(20, description="optimizer steps of the fine-tuning attack")
    fine_tune_rank: Count = Field(8, description="rank of its LoRA adapter")
    fine_tune_data: str = Field(
        "",
        description="its demonstrations, a file with prompt and answer; empty: what the state itself answers to the "
        "unsafe prompts with its neurons pruned",
    )


JudgeName = Literal[
    "refusal-phrases", "refusal-embedding", "llama-guard-3-8b", "llama-guard-3-1b", "harmbench-llama",
    "harmbench-mistral", "strongreject", "wildguard", "shieldgemma-2b", "shieldgemma-9b", "rubric",
]  # fmt: skip


class JudgeTable(SettingsTable):
    """The table [judge]."""

    name: JudgeName | tuple[JudgeName, ...] = Field(
        "refusal-embedding",
        description="who decides whether an answer refuses or complies: refusal-embedding, refusal-phrases, a guard "
        "(llama-guard-3-8b or -1b, harmbench-llama or -mistral, strongreject, wildguard, shieldgemma-2b or -9b), "
        "rubric; or a list of several",
    )
    rule: Literal["majority", "all", "any"] = Field(
        "majority", description="of several judges, how many must say that an answer complies"
    )
    url: str = Field("", description="rubric: an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    model: str = Field("", description="rubric: the judging model's name there")
    key_variable: str = Field("OPENAI_API_KEY", description="rubric: the environment variable that holds the API key")
    timeout: Positive = Field(120.0, description="rubric: seconds for one answer")
    retries: int = Field(4, ge=0, description="rubric: how often a request is repeated that failed for a while")
    concurrency: Count = Field(8, description="rubric: requests under way at once")

    @model_validator(mode="after")
    def _complete(self) -> JudgeTable:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"name must hold different judges, found {', '.join(self.names) or 'none'}")
        if "rubric" in self.names and not (self.url and self.model):
            raise ValueError("the judge rubric needs url and model")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The judges' names."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def label(self) -> str:
        """What reports call the judge, or the judges."""
        return self.names[0] if len(self.names) == 1 else f"{self.rule} of {', '.join(self.names)}"

    def settings(self) -> dict[str, Any]:
        """What decides the verdicts, and nothing else: how patiently a server is asked does not."""
        found: dict[str, Any] = {"name": self.names[0] if len(self.names) == 1 else list(self.names)}
        if len(self.names) > 1:
            found["rule"] = self.rule
        return found | ({"url": self.url, "model": self.model} if "rubric" in self.names else {})


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
                raise ValueError(_sentence(error, f"[variants.{name}]")) from error
        return self

    @model_validator(mode="after")
    def _eyes_only_look(self) -> Config:
        if self.measure.part == "text":
            return self
        if self.align.rounds or self.variants:
            raise ValueError(
                "the eyes stay as they are in training, so that their neurons cannot be frozen; with measure.part = "
                "'eyes' set align.rounds = 0 and variants = {}"
            )
        if self.measure.pooling == "last":
            raise ValueError("pictures have no last token; with measure.part = 'eyes' set measure.pooling to 'mean'")
        of_text = {
            "attack.selectors": self.attack.selectors,
            "attack.knowledge = 'iterated'": "iterated" in self.attack.knowledge,
            "attack.backend = 'vllm'": self.attack.backend == "vllm",
        }
        if any(of_text.values()):
            found = next(name for name, asked in of_text.items() if asked)
            raise ValueError(f"{found} is for neurons of the text decoder; leave it out with measure.part = 'eyes'")
        return self

    @model_validator(mode="after")
    def _spread_models_are_not_changed(self) -> Config:
        if not self.model.device_map:
            return self
        attack = self.attack
        asked = {
            "align.rounds > 0": any(self.variant(name).rounds for name in ["", *self.variants]),
            "snip or gradient in attack.selectors": bool({"snip", "gradient"} & set(attack.selectors)),
            "fine-tune in attack.attempts": "fine-tune" in attack.attempts,
            'attack.backend = "vllm"': attack.backend == "vllm",
        }
        if found := [name for name, wanted in asked.items() if wanted]:
            raise ValueError(
                "model.device_map is for measuring and attacking, but all weights in memory are needed for "
                f"{', '.join(found)}; leave out the one or the other"
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


def _sentence(error: ValidationError, origin: str) -> str:
    # Where a value may have one of several forms, the error deepest inside is about the form that was meant.
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    where = [str(part) for part in found["loc"] if not str(part).startswith(("tuple[", "literal[", "[key]"))]
    name = ".".join(where)
    if found["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        return f"{origin} has the unknown key {name!r}{did_you_mean(where[-1], known)}; known here: {', '.join(known)}"
    if found["type"] == "missing":
        return f"{origin} lacks the key {name!r}; give it a value"
    if found["type"] == "value_error":
        return f"{origin}: {name + ': ' if name else ''}{found['ctx']['error']}"
    in_toml = {"model_type": "it should be a table", "dict_type": "it should be a table", "tuple_type": "use a list"}
    reason = in_toml.get(found["type"], found["msg"][0].lower() + found["msg"][1:])
    return f"{origin}: {name} = {found['input']!r} cannot be used: {reason}"


def _known_keys(tables: Sequence[str]) -> list[str]:
    """The keys of the table at this place, following lists of tables too."""
    table: type[BaseModel] = Config
    for name in tables:
        found = table.model_fields.get(name)
        if found is not None:
            table = next(_tables_in(found.annotation), table)
    return list(table.model_fields)


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _tables_in(part)
