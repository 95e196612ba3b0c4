"""What docs/benchmarks.md quotes: python benchmarks/run.py [PART ...], all parts if none is named.

Times are given as ratios within one run: two ways of doing the same work take turns, and the median ratio is printed
with its range. Every number is of the embedded model on this machine's CPU.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import GenerationConfig

from safeneuron.data.prompts import benign_text, read_prompts
from safeneuron.data.types import Pair, Prompt
from safeneuron.models.forward import POOLINGS, MeasurementSettings, length_batches
from safeneuron.models.loading import load
from safeneuron.models.model import Model, pad
from safeneuron.models.shape import Shape
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.interventions import recorded
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.verification import prove
from safeneuron.planning.memory import Device, align_need, longest_pair, total_bytes
from safeneuron.runtime.devices import peak_memory_mb, reset_peak_memory, reuse_memory
from safeneuron.selection.measurement import measure
from safeneuron.selection.scores import choose, score, thresholds_for
from safeneuron.training.alignment import align
from safeneuron.training.on_policy import refusal
from safeneuron.training.settings import TrainingSettings

PARTS = ("measure", "memory", "plan", "probe", "freeze", "training", "precision", "pooling", "generation", "demo")


def prompts(kind: str, count: int) -> list[Prompt]:
    """So many prompts: the bundled ones, again with a number when they are used up."""
    found = read_prompts(f"twins:{kind}")
    return [Prompt(found[i % len(found)].text + (f" ({i})" if i >= len(found) else "")) for i in range(count)]


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> str:
    """Median and range of time(first) / time(second), the two taking turns after a warm-up."""
    first(), second()
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        first()
        between = time.perf_counter()
        second()
        found.append((between - begun) / (time.perf_counter() - between))
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}, {rounds} rounds)"


def bare_forward(model: Model, asked: list[Prompt]) -> None:
    """The decoder alone on the batches that measure() forms: no hooks, no statistics."""
    encoded = [model.encode([{"role": "user", "content": prompt.text}]) for prompt in asked]
    for batch in length_batches(encoded, 2048):
        ids, mask = pad([encoded[i] for i in batch], int(model.tokenizer.pad_token_id), "right", model.device)
        with torch.inference_mode():
            decoder_of(model.network)(input_ids=ids, attention_mask=mask, use_cache=False)


def research_code(model: Model, asked: list[Prompt]) -> list[torch.Tensor]:
    """The way of the published scripts: one prompt at a time through the whole model, activations kept, then stacked.

    What is kept is the last token's vector only; scripts that keep every token's need many times the memory.
    """
    kept = []
    for prompt in asked:
        ids = torch.tensor([model.encode([{"role": "user", "content": prompt.text}])], device=model.device)
        with torch.inference_mode(), recorded(model) as recording:
            model.network(ids)
        kept.append(torch.cat([recording.layers[layer][0, -1].float() for layer in sorted(recording.layers)]))
    stacked = torch.stack(kept)
    return [stacked.mean(dim=0), stacked.var(dim=0)]


def bench_measure() -> None:
    """(a) and the times of (b)."""
    model = load("embedded", dtype="bfloat16")
    unsafe, safe = prompts("unsafe", 100), prompts("safe", 100)
    print("(a) measure() / bare decoder forward, same batches, 200 prompts:")

    def bare() -> None:
        bare_forward(model, unsafe)
        bare_forward(model, safe)

    print(f"    {ratio(lambda: measure(model, unsafe, safe), bare, 5)}")
    few_unsafe, few_safe = prompts("unsafe", 50), prompts("safe", 50)
    for dtype in ("bfloat16", "float32"):
        other = load("embedded", dtype=dtype)
        found = ratio(
            lambda other=other: (research_code(other, few_unsafe), research_code(other, few_safe)),  # type: ignore[misc]
            lambda: measure(model, few_unsafe, few_safe),
            3,
        )
        print(f"(b) one prompt at a time, whole model in {dtype} / measure() in bfloat16, 100 prompts: {found}")


def bench_memory() -> None:
    """The memory of (b), each figure in a process of its own."""
    for how in ("measure", "research"):
        for count in (100, 400, 1600):
            line = alone("memory-of", how, str(count))
            print(f"(b) peak memory above the loaded model, {how}, {count} prompts: {line}", flush=True)


def alone(*words: str) -> str:
    """The last line that this script prints in a process of its own, given these words."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def memory_of(how: str, count: int) -> None:
    """One figure of bench_memory: MB of peak resident memory above what the loaded model takes."""
    model = load("embedded")
    asked = prompts("unsafe", count // 2), prompts("safe", count - count // 2)
    for few in asked:
        bare_forward(model, few[:40])
    reset_peak_memory()
    before = peak_memory_mb()
    if how == "measure":
        measure(model, *asked)
    else:
        kept = [research_code(model, few) for few in asked]
        assert len(kept) == 2
    print(f"{peak_memory_mb() - before:.0f} MB")


PLANNED: dict[str, dict[str, Any]] = {
    "4 pairs at once": {},
    "2 pairs at once": {"at_once": 2},
    "4 pairs, gradient checkpointing": {"gradient_checkpointing": True},
}
"""Ways to train on 4 pairs of 192 tokens."""


def bench_plan() -> None:
    """(f) the memory that training takes, as it is planned and as it is, each figure in a process of its own."""
    for name in PLANNED:
        line = subprocess.run(
            [sys.executable, __file__, "plan-of", name], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        print(f"(f) training, {name}: {line}", flush=True)


def plan_of(name: str) -> None:
    """One figure of bench_plan: two steps, since the optimizer's moments are made in the first."""
    reuse_memory()
    model = load("embedded", dtype="float32")
    pairs = [
        Pair(({"role": "user", "content": prompt.text},), "word " * 400, "other " * 400)
        for prompt in prompts("unsafe", 4)
    ]
    training = TrainingSettings(epochs=2, batch_size=4, micro_batch_size=4, max_length=192, **PLANNED[name])
    length = longest_pair(model, pairs, training.max_length)
    need = align_need(Shape.of(model.network, model.name), Device.of(model.device), training, length)
    reset_peak_memory()
    align(model, pairs, None, training)
    planned, measured = total_bytes(need) / 2**20, peak_memory_mb()
    print(f"planned {planned:,.0f} MB, measured {measured:,.0f} MB, ratio {planned / measured:.2f}")


def preferences(count: int) -> list[Pair]:
    """Pairs of very different lengths: bundled requests, refusals, and pieces of the bundled prose as answers."""
    words = benign_text().split()
    found = []
    for number, prompt in enumerate(prompts("unsafe", count)):
        answer = " ".join(words[number : number + 4 + 7 * number % 60])
        found.append(Pair(({"role": "user", "content": prompt.text},), refusal(prompt, 0), answer))
    return found


def bench_freeze() -> None:
    """(c) step time and peak memory of DPO with 1 % of the neurons frozen over plain DPO, trainings taking turns."""
    reuse_memory()
    model = load("embedded", dtype="float32")
    pairs = preferences(24)
    first_ones = {layer: range(width // 100) for layer, width in enumerate(model.widths)}
    one_percent = NeuronSet.of(first_ones, model.widths, model.fingerprint).random_like(0)

    def steps(frozen: NeuronSet | None) -> float:
        times: list[float] = []
        align(model, pairs, frozen, TrainingSettings(learning_rate=1e-6, epochs=2, batch_size=4, micro_batch_size=4),
              progress=lambda done, total: times.append(time.perf_counter()))  # fmt: skip
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))

    found = []
    steps(None)
    for _ in range(3):
        plain = steps(None)
        found.append(steps(one_percent) / plain)
    print(f"(c) step time, 1 % of the neurons frozen / plain TRL: {statistics.median(found):.3f} "
          f"({min(found):.3f} to {max(found):.3f}, 3 pairs of trainings of 12 steps)")  # fmt: skip
    peaks = {how: alone("peak-of", how) for how in ("plain", "frozen")}
    print(f"(c) peak memory, 1 % frozen / plain TRL: {float(peaks['frozen']) / float(peaks['plain']):.3f} "
          f"({float(peaks['frozen']):.0f} MB / {float(peaks['plain']):.0f} MB, processes of their own)")  # fmt: skip


def peak_of(how: str) -> None:
    """One figure of bench_freeze: the peak memory in MB of a process that trains three steps."""
    model = load("embedded", dtype="float32")
    first_ones = {layer: range(width // 100) for layer, width in enumerate(model.widths)}
    one_percent = NeuronSet.of(first_ones, model.widths, model.fingerprint).random_like(0)
    training = TrainingSettings(learning_rate=1e-6, epochs=1, batch_size=4, micro_batch_size=4)
    align(model, preferences(12), one_percent if how == "frozen" else None, training)
    print(f"{peak_memory_mb():.1f}")


def bench_training() -> None:
    """Our DPO over TRL's defaults on the same pairs and steps: seconds from the pairs to the trained model."""
    ours: list[float] = []
    theirs: list[float] = []
    losses: dict[str, list[float]] = {}
    for _ in range(2):
        for how, times in (("ours", ours), ("trl", theirs)):
            record = json.loads(alone("train-of", how))
            times.append(record["seconds"])
            losses[how] = record["losses"]
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    print(f"DPO of 64 pairs in 8 steps, TRL's defaults / ours: {min(ratios):.2f} to {max(ratios):.2f}, 2 pairs of runs")
    means = {how: statistics.mean(values) for how, values in losses.items()}
    print(f"    mean loss {means['trl']:.4f} and {means['ours']:.4f}, last {losses['trl'][-1]:.4f} and "
          f"{losses['ours'][-1]:.4f}")  # fmt: skip


def train_of(how: str) -> None:
    """One training of bench_training, in a process of its own."""
    from trl import DPOConfig, DPOTrainer

    from safeneuron.training.dpo import dataset_of

    reuse_memory()
    model = load("embedded", dtype="float32")
    pairs = preferences(64)
    begun = time.perf_counter()
    if how == "ours":
        training = TrainingSettings(learning_rate=1e-5, epochs=1, batch_size=8, micro_batch_size=8, weight_decay=0.0,
                            warmup_share=0.0)  # fmt: skip
        losses = [entry["loss"] for entry in align(model, pairs, None, training).log]
    else:
        with TemporaryDirectory() as folder:
            settings = DPOConfig(
                folder, max_steps=8, learning_rate=1e-5, lr_scheduler_type="cosine", report_to="none", use_cpu=True,
                logging_steps=1, save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = DPOTrainer(model=model.network, ref_model=copy.deepcopy(model.network), args=settings,
                                 train_dataset=dataset_of(pairs), processing_class=model.tokenizer)  # fmt: skip
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"seconds": time.perf_counter() - begun, "losses": losses}))


def bench_precision() -> None:
    """(e) bfloat16 against float32: time, and how alike the selected sets are."""
    asked = read_prompts("twins:unsafe", split="discovery"), read_prompts("twins:safe", split="discovery")
    models = {dtype: load("embedded", dtype=dtype) for dtype in ("float32", "bfloat16")}
    found = ratio(lambda: measure(models["float32"], *asked), lambda: measure(models["bfloat16"], *asked), 3)
    print(f"(e) measure() in float32 / in bfloat16: {found}")
    scores = {dtype: score(measure(model, *asked)) for dtype, model in models.items()}
    for density in (0.003, 0.01, 0.03):
        full, half = (choose(scores[dtype], thresholds_for(scores[dtype], density)) for dtype in models)
        print(
            f"(e) Jaccard of the sets at {density:.1%}: ES {full.es.jaccard(half.es):.3f}, "
            f"SAS {full.sas.jaccard(half.sas):.3f}, FULL {full.union.jaccard(half.union):.3f}"
        )


def bench_pooling() -> None:
    """Which pooling finds the same neurons again: sets from the two halves of the prompts, at the same density."""
    model = load("embedded")
    unsafe, safe = (read_prompts(f"twins:{kind}", split="discovery") for kind in ("unsafe", "safe"))
    for pooling in POOLINGS:
        settings = MeasurementSettings(pooling=pooling)
        whole = score(measure(model, unsafe, safe, settings))
        halves = [score(measure(model, unsafe[start::2], safe[start::2], settings)) for start in (0, 1)]
        first, second = (choose(scores, thresholds_for(scores, 0.03)) for scores in halves)
        print(
            f"pooling {pooling}: largest d {float(whole.d.max()):.2f}, {whole.significant} neurons with q < .05; "
            f"Jaccard of the halves: ES {first.es.jaccard(second.es):.2f}, SAS {first.sas.jaccard(second.sas):.2f}"
        )


def bench_probe(rounds: int = 5) -> None:
    """The proof at loading that the anatomy is right: its time against that of loading, and what it takes in memory."""
    model = load("embedded")
    print(f"probe / loading, which has one: {ratio(lambda: prove(model), lambda: load('embedded'), rounds)}")
    reset_peak_memory()
    before, begun = peak_memory_mb(), time.perf_counter()
    prove(model)
    print(f"probe: {time.perf_counter() - begun:.2f} s; peak memory {peak_memory_mb() - before:+.0f} MB")


def bench_generation(new_tokens: int = 32, rounds: int = 3) -> None:
    """(g) greedy tokens a second by batch, precision and cache, as ratios to bfloat16 with a dynamic cache, one by one.

    Every way generates the full length (end tokens are not heeded), so all do the same work; ways take turns. On one
    thread, and in its processor time: then it hardly matters what else the machine does.
    """
    torch.set_num_threads(1)
    networks = {dtype: load("embedded", dtype=dtype) for dtype in ("bfloat16", "float32")}
    speeds: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds + 1):
        for dtype, model in networks.items():
            for cache, size in itertools.product(("dynamic", "static"), (1, 8, 32)):
                seconds = seconds_to_generate(model, size, new_tokens, cache)
                speeds.setdefault((dtype, cache, size), []).append(size * new_tokens / seconds)
    # The first round is a warm-up.
    base = speeds["bfloat16", "dynamic", 1][1:]
    for (dtype, cache, size), found in speeds.items():
        ratios = [speed / other for speed, other in zip(found[1:], base, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"(g) {dtype:<9} {cache:<8} batch {size:>2}: {statistics.median(ratios):5.2f} ({spread}), "
              f"{statistics.median(found[1:]):.0f} tokens/s", flush=True)  # fmt: skip


def seconds_to_generate(model: Model, size: int, new_tokens: int, cache: str) -> float:
    """Processor time for ``new_tokens`` greedy tokens after each of ``size`` prompts side by side."""
    encoded = [model.encode([{"role": "user", "content": prompt.text}]) for prompt in prompts("safe", size)]
    ids, mask = pad(encoded, int(model.tokenizer.pad_token_id), "left", model.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
        pad_token_id=model.tokenizer.pad_token_id, cache_implementation=cache, disable_compile=True,
    )  # fmt: skip
    begun = time.process_time()
    with torch.inference_mode():
        cast(Any, model.network).generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return time.process_time() - begun


def bench_demo(folder: str = "runs/demo") -> None:
    """(d) time and memory of each stage of a finished demo."""
    records = [
        json.loads(path.read_text())
        for path in sorted(Path(folder).rglob("done.json"), key=lambda p: p.stat().st_mtime)
    ]
    for record in records:
        print(f"(d) {record['stage']:<18} {record['seconds']:8.1f} s {record['peak_memory_mb']:6d} MB")
    total = sum(record["seconds"] for record in records)
    print(f"(d) {'all stages':<18} {total:8.1f} s {max(record['peak_memory_mb'] for record in records):6d} MB")


def main(arguments: list[str]) -> None:
    """Run the named parts, or all of them."""
    if arguments[:1] == ["memory-of"]:
        memory_of(arguments[1], int(arguments[2]))
        return
    if arguments[:1] == ["plan-of"]:
        plan_of(arguments[1])
        return
    if arguments[:1] in (["peak-of"], ["train-of"]):
        (peak_of if arguments[0] == "peak-of" else train_of)(arguments[1])
        return
    parts = {
        "measure": bench_measure,
        "memory": bench_memory,
        "plan": bench_plan,
        "probe": bench_probe,
        "freeze": bench_freeze,
        "training": bench_training,
        "precision": bench_precision,
        "pooling": bench_pooling,
        "generation": bench_generation,
        "demo": bench_demo,
    }
    for name in arguments or PARTS:
        parts[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
