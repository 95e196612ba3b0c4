"""A training loop of your own while the safety neurons stay exactly as they are."""

import torch
from shared import options, preferences, safety_neurons, show_proof, weights_of

import safeneuron as sn

given = options(__doc__)
model = sn.load(given.model, dtype="float32")
neurons = safety_neurons(model)
before = weights_of(model.network)

rows = preferences()
model.network.train()
optimizer = torch.optim.AdamW(model.network.parameters(), lr=5e-5, weight_decay=0.1)
with sn.frozen(model, neurons, optimizer):  # verified when the block ends
    for step in range(given.steps):
        row = rows[step % len(rows)]
        text = model.tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        loss = model.network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
show_proof(before, model.network, neurons)
