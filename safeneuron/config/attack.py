"""The tables of the attacks, and of those who judge the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from safeneuron.config.tables import Count, Positive, SettingsTable

JudgeName = Literal[
    "refusal-phrases", "refusal-embedding", "llama-guard-3-8b", "llama-guard-3-1b", "harmbench-llama",
    "harmbench-mistral", "strongreject", "wildguard", "shieldgemma-2b", "shieldgemma-9b", "rubric",
]  # fmt: skip
JUDGES: tuple[str, ...] = get_args(JudgeName)
"""The names of all judges."""
Rule = Literal["majority", "all", "any"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""Of several judges, how many must say that an answer complies."""
AttemptName = Literal[
    "direction", "fine-tune", "prefill-sure", "prefill-steps", "prefix-injection", "refusal-suppression", "role-play",
    "hypothetical", "translation", "base64",
]  # fmt: skip


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


class JudgeTable(SettingsTable):
    """The table [judge]."""

    name: JudgeName | tuple[JudgeName, ...] = Field(
        "refusal-embedding",
        description="who decides whether an answer refuses or complies: refusal-embedding, refusal-phrases, a guard "
        "(llama-guard-3-8b or -1b, harmbench-llama or -mistral, strongreject, wildguard, shieldgemma-2b or -9b), "
        "rubric; or a list of several",
    )
    rule: Rule = Field("majority", description="of several judges, how many must say that an answer complies")
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
        values: dict[str, Any] = {"name": self.names[0] if len(self.names) == 1 else list(self.names)}
        if len(self.names) > 1:
            values["rule"] = self.rule
        return values | ({"url": self.url, "model": self.model} if "rubric" in self.names else {})
