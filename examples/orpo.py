"""Odds-ratio preference optimisation with TRL, without a reference, while the safety neurons stay as they are."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

trainer = ORPOTrainer(
    model.network,
    args=ORPOConfig(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        bf16=False,
        remove_unused_columns=False,
    ),
    train_dataset=Dataset.from_list(preferences()),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, model.network, neurons)
