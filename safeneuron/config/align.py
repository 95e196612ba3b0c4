"""The table [align]: the settings of a training, the only place with their defaults and what they may be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from safeneuron.config.tables import Count, Fraction, Positive, SettingsTable


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
