"""LoRA adapters in TRL's DPOTrainer; merged at the end, they leave the safety neurons exactly as they are."""

from datasets import Dataset
from peft import LoraConfig
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import DPOConfig, DPOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

trainer = DPOTrainer(
    model.network,
    args=DPOConfig(given.out, max_steps=given.steps, per_device_train_batch_size=2, learning_rate=1e-4, bf16=False),
    train_dataset=Dataset.from_list(preferences()),
    processing_class=model.tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
show_proof(before, sn.merge_adapters(trainer.model), neurons)
