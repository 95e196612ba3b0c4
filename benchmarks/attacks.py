"""What docs/benchmarks.md says of attacks: python benchmarks/attacks.py.

Ratios of two ways of doing the same work that take turns, on the embedded model. They are of processor time, not of
time on the clock, so that what else the machine does counts little; give it one thread (OMP_NUM_THREADS=1), since
threads that wait are counted too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from run import prompts

from safeneuron.models.exchanges import Exchange, common_ending, exchanges_of, prompts_alone
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.layout import feed_forwards
from safeneuron.neurons.linears import linear_in
from safeneuron.selection.contrast import activation_contrast, gradient_gap
from safeneuron.selection.linear_probe import probe
from safeneuron.selection.measurement import measure
from safeneuron.selection.saliency import snip, wanda

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Here is what you asked for, step by step."


def seconds(work: Callable[[], object]) -> float:
    """Processor time of some work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> str:
    """Median and range of the first's time over the second's."""
    found = [seconds(first) / seconds(second) for _ in range(rounds)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}, {rounds} rounds)"


def slow_snip(model: Model, exchanges: Sequence[Exchange]) -> list[torch.Tensor]:
    """SNIP as the published code computes it: one answer at a time, the gradient of every weight, scores per weight."""
    modules = [
        linear_in(m) for block in feed_forwards(model) for m in (*(r.module for r in block.inputs), block.output)
    ]
    scores = [torch.zeros(module.weight.shape) for module in modules]
    for one in exchanges:
        model.network.zero_grad()
        ids = torch.tensor([one.ids])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < one.prompt, -100)
        model.network(input_ids=ids, labels=labels).loss.backward()
        for score, module in zip(scores, modules, strict=True):
            assert module.weight.grad is not None, "just computed"
            score += (module.weight.detach() * module.weight.grad).abs().float()
    model.network.zero_grad()
    return scores


def slow_activations(model: Model, exchanges: Sequence[Exchange], last: int | None = None) -> list[torch.Tensor]:
    """One at a time through the whole model, the activations of the answer's (or the prompt's last) tokens kept."""
    kept = []
    for one in exchanges:
        with torch.inference_mode(), recorded(model) as recording:
            model.network(torch.tensor([one.ids]))
        part = slice(one.prompt, None) if last is None else slice(one.prompt - last, one.prompt)
        kept.append(torch.cat([recording.layers[layer][0, part].float() for layer in sorted(recording.layers)], dim=1))
    return kept


def slow_wanda(model: Model, exchanges: Sequence[Exchange]) -> list[torch.Tensor]:
    """Wanda one answer at a time through the whole model, the input of every FFN matrix kept until the end."""
    modules = [
        linear_in(m) for block in feed_forwards(model) for m in (*(r.module for r in block.inputs), block.output)
    ]
    kept: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(modules))}
    for one in exchanges:
        handles = [
            module.register_forward_pre_hook(lambda _, inputs, n=n: kept[n].append(inputs[0][0, one.prompt :].float()))  # noqa: B023
            for n, module in enumerate(modules)
        ]
        with torch.inference_mode():
            model.network(torch.tensor([one.ids]))
        for handle in handles:
            handle.remove()
    return [
        module.weight.detach().abs().float() * torch.cat(kept[number]).square().mean(dim=0).sqrt()
        for number, module in enumerate(modules)
    ]


def slow_gradient_gap(model: Model, refused: Sequence[Exchange], safe: Sequence[Exchange]) -> list[torch.Tensor]:
    """Gradient times gap one prompt at a time: the whole model, backward through all of it, activations kept."""
    kept, last = [], common_ending(model)
    for one in refused:
        seen: list[torch.Tensor] = []
        handles = [
            block.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # noqa: B023
            for block in feed_forwards(model)
        ]
        ids = torch.tensor([one.ids])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < one.prompt, -100)
        loss = model.network(input_ids=ids, labels=labels).loss
        for handle in handles:
            handle.remove()
        for values in seen:
            values.retain_grad()
        model.network.zero_grad()
        loss.backward()
        kept += [(values.grad[0, one.prompt - last : one.prompt], values.detach()) for values in seen]  # type: ignore[index]
    model.network.zero_grad()
    return [*(gradient for gradient, _ in kept), *slow_activations(model, safe, last)]


def slow_probe(model: Model, exchanges: Sequence[Exchange], harmful: int) -> list[torch.Tensor]:
    """NeuroStrike's way: one prompt at a time, then 5,000 epochs of Adam on each layer."""
    vectors = torch.stack([values[-1] for values in slow_activations(model, exchanges, 1)])
    labels = (torch.arange(len(vectors)) < harmful).float()[:, None]
    weights = []
    for layer in vectors.split(model.widths[0], dim=1):
        linear = torch.nn.Linear(layer.shape[1], 1)
        optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3, weight_decay=1e-3)
        for _ in range(5000):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(linear(layer), labels).backward()
            optimizer.step()
        weights.append(linear.weight.detach()[0])
    return weights


def bench_selectors() -> None:
    """(h) each streaming selector against one prompt at a time, both in one precision."""
    for dtype in ("bfloat16", "float32"):
        selectors_in(dtype, 16)


def selectors_in(dtype: str, count: int) -> None:
    """The ratios of (h) in one precision, with so many prompts of each class."""
    model = load("embedded", dtype=dtype)
    unsafe, safe = prompts("unsafe", count), prompts("safe", count)
    refused, answered = exchanges_of(model, unsafe, [REFUSAL] * count), exchanges_of(model, safe, [ANSWER] * count)
    both = [*refused, *answered]
    other = load("embedded", dtype=dtype)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "SNIP": (lambda: slow_snip(model, both), lambda: (snip(model, refused), snip(model, answered))),
        "Wanda": (lambda: slow_wanda(model, both), lambda: (wanda(model, refused), wanda(model, answered))),
        "contrast": (
            lambda: (slow_activations(model, refused), slow_activations(other, refused)),
            lambda: activation_contrast(model, other, refused),
        ),
        "gradient x gap": (
            lambda: slow_gradient_gap(model, refused, answered),
            lambda: gradient_gap(model, refused, answered),
        ),
    }
    if dtype == "bfloat16":  # The probe's fit takes minutes and is in float32 anyway.
        pairs["probe"] = (
            lambda: slow_probe(model, prompts_alone(model, [*unsafe, *safe]), count),
            lambda: probe(model, unsafe, safe),
        )
    measure(model, unsafe[:2], safe[:2])
    for name, (slow, fast) in pairs.items():
        print(
            f"(h) {name}, {dtype}, {2 * count} prompts, one at a time / streaming: {ratio(slow, fast, 1)}", flush=True
        )


if __name__ == "__main__":
    bench_selectors()
