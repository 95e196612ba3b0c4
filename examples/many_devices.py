"""DPO on any number of devices: started with ``accelerate launch`` and a config of configs/accelerate/, or alone.

Every process runs this script. Nothing in it is about devices but where the model is loaded and that one process shows
the proof. A model too large for every process to hold has its neurons found before, with ``safeneuron measure``.
"""

import torch
from accelerate import PartialState
from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import DPOConfig, DPOTrainer

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32", device="cpu")  # accelerate moves the weights, or shares them out
before = weights_of(model.network)

processes = PartialState()
neurons = safety_neurons(model)  # by all together: each takes its share of the prompts, and gets the same neurons

trainer = DPOTrainer(
    model.network,
    args=DPOConfig(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,  # the configs with sharded models do it layer by layer
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(preferences()),
    processing_class=model.tokenizer,
    callbacks=[sn.FreezeNeurons(neurons)],
)
trainer.train()
trainer.save_model(f"{given.out}/model")  # a plain folder again, however the model was shared out
if processes.is_main_process:
    show_proof(before, sn.load(f"{given.out}/model", dtype="float32", device="cpu").network, neurons)
