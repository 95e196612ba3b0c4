"""Direct preference optimisation with TRL while the safety neurons stay exactly as they are (the paper's defence)."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import DPOConfig, DPOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

trainer = DPOTrainer(
    model.network,
    args=DPOConfig(given.out, max_steps=given.steps, per_device_train_batch_size=2, weight_decay=0.1, bf16=False),
    train_dataset=Dataset.from_list(preferences()),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, model.network, neurons)
