"""Training that stops half-way and goes on from its checkpoint: the frozen neurons are those of the first start."""

import torch
from datasets import Dataset
from shared import options, preferences, safety_neurons, show_proof, weights_of
from trl import SFTConfig, SFTTrainer

import safeneuron as sn

given = options(__doc__)
half = max(1, given.steps // 2)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
neurons.save(f"{given.out}/neurons.json")  # a new process needs them, and must not look for them again
before = weights_of(model.network)


def train(network: torch.nn.Module, steps: int, resume: bool) -> None:
    """Train up to so many steps, with a checkpoint half-way."""
    trainer = SFTTrainer(
        network,
        args=SFTConfig(
            f"{given.out}/checkpoints",
            max_steps=steps,
            save_steps=half,
            per_device_train_batch_size=2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
        ),
        processing_class=model.tokenizer,
        callbacks=[sn.FreezeNeurons(sn.NeuronSet.load(f"{given.out}/neurons.json"))],
    )
    trainer.train(resume_from_checkpoint=resume)


train(model.network, half, resume=False)
model = sn.load(given.model, dtype="float32")  # as a new process would, with the weights of the start
train(model.network, half + given.steps, resume=True)  # refused if the checkpoint's frozen neurons were not the first
show_proof(before, model.network, neurons)
