"""Kahneman-Tversky optimisation with TRL, from single judged answers, while the safety neurons stay as they are."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import KTOConfig, KTOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

rows = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in preferences()
    for kind in ("chosen", "rejected")
]
trainer = KTOTrainer(
    model.network,
    args=KTOConfig(given.out, max_steps=given.steps, per_device_train_batch_size=2, weight_decay=0.1, bf16=False),
    train_dataset=Dataset.from_list(rows),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, model.network, neurons)
