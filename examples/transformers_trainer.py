"""Fine-tune with the Trainer of transformers while the safety neurons stay exactly as they are."""

from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

texts = [model.tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in preferences()]
trainer = Trainer(
    model.network,
    args=TrainingArguments(given.out, max_steps=given.steps, per_device_train_batch_size=2, weight_decay=0.1),
    train_dataset=Dataset.from_list([dict(model.tokenizer(text, add_special_tokens=False)) for text in texts]),
    data_collator=DataCollatorForLanguageModeling(model.tokenizer, mlm=False),
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, model.network, neurons)
