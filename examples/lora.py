"""LoRA with frozen neurons in TRL's trainer: python examples/lora.py MODEL FOLDER writes the merged model to FOLDER.

MODEL is a name on the Hub or a folder; without arguments it is the embedded model, and FOLDER is merged. The pairs are
only there to show the form.
"""

import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import safeneuron as sn
from safeneuron.freezing import Freeze

name, folder = sys.argv[1:] or ("embedded", "merged")
model = sn.load(name, dtype="float32")
unsafe = sn.read_prompts("twins:unsafe", split="discovery", count=16)
safe = sn.read_prompts("twins:safe", split="discovery", count=16)
neurons = sn.select(sn.measure(model, unsafe=unsafe, safe=safe), density=0.01)
print(f"frozen: {neurons}")

pairs = [
    {"prompt": f"Say a word with {letter}.", "chosen": f"{letter} is a letter.", "rejected": "No."} for letter in "abcd"
]
trainer = DPOTrainer(
    model.network,
    args=DPOConfig(
        "out", max_steps=4, per_device_train_batch_size=2, learning_rate=2e-4, bf16=False, report_to="none", save_steps=4
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=model.tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[sn.FreezeNeurons(neurons)],  # the one line: masks the adapters and proves it at every save
)
trainer.train()

given = Freeze(sn.load(name, dtype="float32"), neurons)
merged = sn.Model(sn.merge_adapters(trainer.model), model.tokenizer, model.name, model.source)
assert Freeze(merged, neurons).digest() == given.digest()
print(f"the {len(neurons)} frozen neurons of the merged model are the given ones, bit for bit")
merged.save(Path(folder))
