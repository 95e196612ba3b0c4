"""Train a reward model with TRL while the safety neurons that were found on the chat model stay exactly as they are."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)

# The same decoder with one score instead of a language head: its neurons are the chat model's.
scorer = AutoModelForSequenceClassification.from_pretrained(model.source, num_labels=1, dtype="float32")
before = weights_of(scorer)

trainer = RewardTrainer(
    scorer,
    args=RewardConfig(given.out, max_steps=given.steps, per_device_train_batch_size=2, weight_decay=0.1, bf16=False),
    train_dataset=Dataset.from_list(preferences()),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, scorer, neurons)
