"""Every trainer that neurons are frozen in, on a tiny network and a handful of rows: some steps take half a second."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.helpers import tiny
from tests.helpers.frozen_checks import add_noise

Callbacks = Sequence[TrainerCallback]


def arguments(kind: type[TrainingArguments], folder: Path, **changes: object) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
        **changes,
    }
    return kind(**settings)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def prompts() -> list[dict[str, list[dict[str, str]]]]:
    return [{"prompt": message("user", f"say {number}")} for number in range(8)]


def pairs() -> Dataset:
    answers = {"chosen": message("assistant", "no"), "rejected": message("assistant", "yes")}
    return Dataset.from_list([{**prompt, **answers} for prompt in prompts()])


def plain_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    ids = torch.randint(4, 260, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    given = {name: changes.pop(name) for name in ("optimizers",) if name in changes}
    settings = arguments(TrainingArguments, folder, **changes)
    return Trainer(
        model=network, args=settings, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks), **given
    )


def sft_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    rows = Dataset.from_list([{"messages": message("user", f"say {i}") + message("assistant", "no")} for i in range(8)])
    return SFTTrainer(
        model=network,
        args=arguments(SFTConfig, folder, max_length=32, **changes),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def dpo_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    reference = changes.pop("ref_model", None) or copy.deepcopy(network)
    return DPOTrainer(
        model=network,
        ref_model=reference,
        # TRL turns gradient checkpointing off and on around the reference, which leaves a hook of its own each time.
        args=arguments(DPOConfig, folder, **{"max_length": 32, "gradient_checkpointing": False, **changes}),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def kto_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    judged = [{"completion": message("assistant", "no" if good else "yes"), "label": good} for good in (True, False)]
    return KTOTrainer(
        model=network,
        ref_model=copy.deepcopy(network),
        args=arguments(KTOConfig, folder, max_length=32, **changes),
        train_dataset=Dataset.from_list([{**prompt, **judged[i % 2]} for i, prompt in enumerate(prompts())]),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def orpo_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    return ORPOTrainer(
        model=network,
        args=arguments(ORPOConfig, folder, max_length=32, remove_unused_columns=False, **changes),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def reward_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    return RewardTrainer(
        model=network,
        args=arguments(RewardConfig, folder, max_length=32, **changes),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def grpo_trainer(network: nn.Module, folder: Path, callbacks: Callbacks, **changes: object) -> Trainer:
    def variety(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    return GRPOTrainer(
        model=network,
        reward_funcs=variety,
        args=arguments(GRPOConfig, folder, **{**sizes, **changes}),
        train_dataset=Dataset.from_list(prompts()),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def classifier_of(network: nn.Module) -> nn.Module:
    """A model with one score a text instead of a language head, on the same decoder."""
    settings = copy.deepcopy(network.config)
    settings.num_labels = 1
    classifier = add_noise(AutoModelForSequenceClassification.from_config(settings))
    classifier.model.load_state_dict(network.model.state_dict())
    return classifier.train()


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "transformers": plain_trainer,
    "SFT": sft_trainer,
    "DPO": dpo_trainer,
    "KTO": kto_trainer,
    "ORPO": orpo_trainer,
    "reward": reward_trainer,
    "GRPO": grpo_trainer,
}
