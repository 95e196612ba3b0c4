"""Group-relative policy optimisation with TRL, on own answers, while the safety neurons stay exactly as they are."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import GRPOConfig, GRPOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)


def brevity(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """The shorter, the better: put your own reward here."""
    return [-float(len(completion[0]["content"])) for completion in completions]


trainer = GRPOTrainer(
    model.network,
    reward_funcs=brevity,
    args=GRPOConfig(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        weight_decay=0.1,
        bf16=False,
    ),
    train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences()]),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, model.network, neurons)
