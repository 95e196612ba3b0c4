"""How long the stages of a config will take: what each does, counted from the config and its texts, and what it costs.

The figures are those of a device at full speed; ``table_of_times`` makes ranges of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from safeneuron.config.align import AlignTable
from safeneuron.config.attack import AttackTable
from safeneuron.config.schema import Config
from safeneuron.config.states import BASE, State, states_of
from safeneuron.config.tables import SourceTable
from safeneuron.data.rows import Source
from safeneuron.data.types import Prompt
from safeneuron.errors import InputError
from safeneuron.models.shape import Shape
from safeneuron.planning.lengths import available_pairs, available_prompts, some_of
from safeneuron.planning.memory import Device, bytes_per_number
from safeneuron.planning.plan import ModelSpec
from safeneuron.runtime.devices import device_named
from safeneuron.training.settings import TrainingSettings

CALL = 5e-4
"""Seconds of Python in each layer of each pass, on any device: dozens of small operations that have to be started."""
SLOWER = 4.0
"""Real work reaches a quarter of a device's speed or more: there are norms, softmax, padding and small matrices."""
ADAM_BYTES = 40
"""What an optimizer step reads and writes of each trained weight: gradient, weight, two moments, clipping, zeroing."""
SECONDS = 0.4
"""How long each of the two figures is measured."""
BUFFER = 2**28
"""Bytes that are read to measure the memory: more than any cache holds."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: operations in products of matrices, and bytes read from its memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, traffic: float) -> float:
        """How long so many operations on so many bytes take at least."""
        return max(flops / self.flops, traffic / self.bandwidth)


def measured(place: torch.device, b: int, shape: Shape) -> Speed:
    """The speed of this device, from products of matrices as large as the model's; takes about a second."""
    dtype = torch.bfloat16 if b == 2 else torch.float32
    width = max(1, min(shape.width, 2**26 // shape.hidden))
    tokens = 512 if place.type == "cpu" else 4096
    first = torch.ones(tokens, shape.hidden, device=place, dtype=dtype)
    second = torch.ones(shape.hidden, width, device=place, dtype=dtype)
    flops = 2 * tokens * shape.hidden * width / _fastest(lambda: first @ second, place)
    # Bytes are bytes, and in float32 every device has a product that does nothing but read.
    rows = torch.ones(4096, BUFFER // 4 // 4096, device=place)
    vector = torch.ones(rows.shape[1], device=place)
    return Speed(flops, rows.nbytes / _fastest(lambda: rows @ vector, place))


def _fastest(work: Callable[[], torch.Tensor], place: torch.device) -> float:
    """Seconds of the fastest of as many repetitions as fit, after one to warm up."""

    def once() -> float:
        begun = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - begun

    with torch.inference_mode():
        once()
        found = [once()]
        while sum(found) < SECONDS:
            found.append(once())
    return min(found)


def forward_flops(shape: Shape, tokens: float, length: float, scored: float = 0) -> float:
    """Operations of a pass forward: 2 A T, causal attention 2 n Q T L, the head's 2 V H of each ``scored`` token."""
    attention = 2 * shape.layers * shape.queries * tokens * length
    return 2 * shape.active * tokens + attention + 2 * shape.vocabulary * shape.hidden * scored


def reading_seconds(shape: Shape, speed: Speed, prompts: int, length: float, batch_tokens: int, b: int) -> float:
    """Prompts through the layers, once: passes of about ``batch_tokens``, each of which reads all weights, b W."""
    passes = math.ceil(prompts * length / batch_tokens)
    flops = forward_flops(shape, prompts * length, length)
    return speed.seconds(flops, passes * b * shape.weights) + passes * shape.layers * CALL


def answering_seconds(
    shape: Shape, speed: Speed, prompts: int, length: float, new_tokens: int, batch_size: int, b: int
) -> float:
    """Answers of ``new_tokens`` each, ``batch_size`` side by side.

    First the prompts, then token after token: each reads all weights and the head, b (W + V H), and the KV cache, 2 b n
    K a token of each row; and computes 2 (A + V H) and attention over what is there, 4 n Q a token of it.
    """
    if not prompts:
        return 0.0
    batches = math.ceil(prompts / batch_size)
    rows, there = prompts / batches, length + new_tokens / 2
    head = shape.vocabulary * shape.hidden
    weights = b * (shape.weights + head)
    flops = rows * (2 * (shape.active + head) + 4 * shape.layers * shape.queries * there)
    traffic = weights + 2 * b * shape.layers * shape.keys * rows * there
    first = speed.seconds(forward_flops(shape, rows * length, length, rows), weights)
    step = speed.seconds(flops, traffic) + shape.layers * CALL
    return batches * (first + new_tokens * step)


def training_seconds(
    shape: Shape, speed: Speed, training: TrainingSettings, pairs: int, length: float, share: float
) -> float:
    """DPO on pairs of two sequences of ``length``; ``share`` of the forward passes is done once more (``refresh``).

    A pass back computes twice what the pass forward does, or once where only adapters are trained; with gradient
    checkpointing the pass forward is done again for it, and the head's always is. The reference is one more pass
    forward over all pairs. Each optimizer step moves ``ADAM_BYTES`` of every trained weight.
    """
    tokens = 2 * pairs * length
    once, head = forward_flops(shape, tokens, length), 2 * shape.vocabulary * shape.hidden * tokens
    back = 1 if training.lora_rank else 2
    passes = 1 + back + training.gradient_checkpointing + share
    flops = (once + head) + training.epochs * (passes * once + (2 + back) * head)
    trained = training.lora_rank * (shape.inputs + shape.outputs) * shape.layers or shape.parameters
    steps = math.ceil(training.epochs * pairs / training.batch_size)
    calls = math.ceil(pairs / training.micro_batch_size) * (1 + training.epochs * (2 + back))
    return flops / speed.flops + steps * ADAM_BYTES * trained / speed.bandwidth + calls * shape.layers * CALL


def parse_bandwidth(text: str) -> float:
    """Bytes a second of a text such as 3.3TB. Raises ``InputError`` for one that is none."""
    units = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
    number, unit = text.strip().upper().removesuffix("/S")[:-2], text.strip().upper().removesuffix("/S")[-2:]
    try:
        found = float(number) * units[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < math.inf:
        raise InputError(f"--device-bandwidth expects bytes a second such as 3.3TB, but found {text!r}")
    return found


def time_words(seconds: float) -> str:
    """A time to two figures, in the unit that suits it."""
    units = {"days": (86400, 3 * 86400), "h": (3600, 2 * 3600), "min": (60, 120), "s": (1, 0)}
    unit = next(name for name, (_, least) in units.items() if seconds >= least)
    number = seconds / units[unit][0]
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"


ROWS, TOKENS = 1000, 256
"""What a source is taken for that has yet to be fetched: so many rows, unless it has a count, of so many tokens."""
REFUSAL = 40
"""About how many tokens a refusal of an on-policy pair has."""
LEFT_OUT = (
    "left out: loading and saving, judges, benchmarks, rival selectors, fine-tuning and the search for the refusal "
    "direction, what devices tell one another; answers are taken to be as long as they may be"
)


class Job(NamedTuple):
    """One kind of stage: how often it is done, the seconds that each takes at full speed, and what it does."""

    stage: str
    times: int
    seconds: float
    work: str


class Amount(NamedTuple):
    """How many prompts or pairs there are, their mean length in tokens, and the mean number of patches of each."""

    number: int
    length: float
    patches: float


@dataclass
class Clock:
    """What times the work: the model on paper, its device, and the speeds for computing and for training.

    ``fetched`` collects the sources whose rows are guessed.
    """

    paper: ModelSpec
    device: Device
    computing: Speed
    training: Speed
    fetched: list[str] = field(default_factory=list)

    def reading(self, amount: Amount, batch_tokens: int, b: int) -> float:
        """Seconds of measuring so many prompts once."""
        found = reading_seconds(self.paper.shape, self.computing, amount.number, amount.length, batch_tokens, b)
        return (found + self.looking(amount)) / self.device.count

    def answering(self, amount: Amount, new_tokens: int, batch_size: int, b: int) -> float:
        """Seconds of answering so many prompts once."""
        found = answering_seconds(
            self.paper.shape, self.computing, amount.number, amount.length, new_tokens, batch_size, b
        )
        return (found + self.looking(amount)) / self.device.count

    def looking(self, amount: Amount) -> float:
        """Seconds that the vision tower has for the pictures."""
        weights = 0 if self.paper.eyes is None else self.paper.eyes.parameters
        return 2 * weights * amount.number * amount.patches / self.computing.flops

    def prompts(self, tables: Sequence[SourceTable], most: int) -> Amount:
        """What these sources hold, each prompt cut to ``most`` tokens."""
        parts = []
        for table in tables:
            found = available_prompts(Source(**table.model_dump()))
            if found is None:
                parts.append(self._unseen(table, most))
                continue
            shown = found.pictured or list(some_of(found.all))
            parts.append(self._amount(len(found.all), [(conversation_of(one), one.image) for one in shown], most))
        return _together(parts)

    def pairs(self, tables: Sequence[Any], most: int, wanted: int | None) -> Amount:
        """The same of pairs, each as long as the longer of its sequences; unseen there are as many as ``wanted``."""
        parts = []
        for table in tables:
            found = available_pairs(Source(**table.model_dump()))
            if found is None:
                parts.append(self._unseen(table, most, wanted))
                continue
            shown = found.pictured or list(some_of(found.all))
            part = self._amount(len(found.all), [(one.prompt, one.image) for one in shown], most)
            answers = [max(self.paper.lengths.words(text) for text in (one.chosen, one.rejected)) for one in shown]
            parts.append(part._replace(length=min(most, part.length + sum(answers) / len(answers))))
        return _together(parts)

    def _amount(self, count: int, shown: Sequence[tuple[Any, Any]], most: int) -> Amount:
        lengths = [self.paper.lengths.of(messages, image) or most for messages, image in shown]
        seen = [(messages, image) for messages, image in shown if image is not None]
        eyes = self.paper.eyes
        patches = [self.paper.lengths.patches(eyes, *one) for one in seen] if eyes is not None else []
        return Amount(count, sum(min(one, most) for one in lengths) / len(lengths), sum(patches) / len(shown))

    def _unseen(self, table: Any, most: int, wanted: int | None = None) -> Amount:
        if table.path not in self.fetched:
            self.fetched.append(table.path)
        return Amount(table.count or wanted or ROWS, min(most, TOKENS), 0)


def conversation_of(prompt: Prompt) -> tuple[dict[str, str], ...]:
    """The conversation of a prompt."""
    return ({"role": "user", "content": prompt.written},)


def _together(parts: Sequence[Amount]) -> Amount:
    count = sum(part.number for part in parts)
    if not count:
        return Amount(0, 0, 0)
    return Amount(
        count,
        sum(part.number * part.length for part in parts) / count,
        sum(part.number * part.patches for part in parts) / count,
    )


def jobs(config: Config, clock: Clock) -> Iterator[Job]:
    """The stages of a run that compute with the model, in order; those that are alike once, with their number."""
    states = states_of(config)
    table, attack = config.measure, config.attack
    b = bytes_per_number(config.model.dtype, clock.device)
    classes = clock.prompts([*config.data.unsafe, *config.data.safe], table.max_tokens)
    once = clock.reading(classes, table.batch_tokens, b)
    yield Job("measure", len(states), once, f"{classes.number:,} prompts of {classes.length:.0f} tokens")
    if "iterated" in attack.knowledge:
        searches = attack.searches - 1
        yield Job("iterate", len(states), searches * once, f"{searches} more searches")
    unsafe, safe = (clock.prompts(own, table.max_tokens) for own in (config.data.test_unsafe, config.data.test_safe))
    for state, times in ((BASE, 1), (states[-1], len(states) - 1)):
        harmful, harmless = streams(attack, state)
        seconds = sum(
            many * clock.answering(amount, attack.max_new_tokens, attack.batch_size, b)
            for amount, many in ((unsafe, harmful), (safe, harmless))
        )
        answers = harmful * unsafe.number + harmless * safe.number
        name = "attack T0" if state == BASE else "attack"
        if times:
            yield Job(name, times, seconds, f"{answers:,} answers of {attack.max_new_tokens} tokens")
    if len(states) > 1:
        yield from _training_jobs(config, clock, b, classes)


def streams(table: AttackTable, state: State) -> tuple[int, int]:
    """How many times the harmful, and the harmless, test prompts are answered by a state: once under each attack."""
    ways = [way for way in table.knowledge if way != "iterated"]
    if state == BASE and "static" in ways:
        ways = ["static"]
    basic = 1 + len(ways) * len(table.sets) + ("iterated" in table.knowledge) + table.random
    selectors = [name for name in table.selectors if name != "contrast" or state != BASE]
    others = len(table.curve) + len(selectors) + len(table.operators) + bool(table.transfer) + len(table.attempts)
    return basic + others, {"always": basic, "unpruned": 1, "never": 0}[table.over_refusal]


def _training_jobs(config: Config, clock: Clock, b: int, classes: Amount) -> Iterator[Job]:
    """The making of pairs, and each training."""
    pairs, made = _pairs(config, clock)
    if made.number:
        seconds = clock.answering(made, config.pairs.max_new_tokens, config.attack.batch_size, b)
        yield Job("pairs", 1, seconds, f"{made.number:,} answers of {config.pairs.max_new_tokens} tokens")
    for name in ["", *config.variants]:
        table = config.variant(name)
        if table.rounds:
            seconds = _training(config, table, clock, pairs, classes, b)
            work = f"{table.epochs:g} x {pairs.number:,} pairs of 2 x {pairs.length:.0f} tokens"
            yield Job(f"align {name}" if name else "align", table.rounds, seconds, work)


def _training(config: Config, table: AlignTable, clock: Clock, pairs: Amount, classes: Amount, b: int) -> float:
    training = TrainingSettings.of(table, config.seed)
    share = table.refresh_share if table.refresh and table.kl_weight else 0.0
    seconds = training_seconds(clock.paper.shape, clock.training, training, pairs.number, pairs.length, share)
    seconds += (1 + training.epochs) * 2 * clock.looking(pairs)
    if table.refresh:
        found = 1 + training.epochs * pairs.number // training.batch_size // table.refresh
        searched = classes._replace(number=min(classes.number, 2 * table.refresh_prompts))
        # All processes search together, and share the prompts.
        again = found * table.refresh_searches * clock.reading(searched, config.measure.batch_tokens, b)
        return seconds / clock.device.count + again
    return seconds / clock.device.count


def _pairs(config: Config, clock: Clock) -> tuple[Amount, Amount]:
    """The pairs that are trained on, and the prompts that are answered to make them."""
    table, most = config.pairs, config.align.max_length
    unsafe, safe = (clock.prompts(own, most) for own in (table.unsafe, table.safe))
    answer = max(table.max_new_tokens, REFUSAL)
    own = {"safety": [unsafe], "general": [safe]} if table.general == "on-policy" else {"safety": [unsafe, safe]}
    found, made = {}, []
    for name, sources in (("safety", table.safety), ("general", table.general)):
        if sources == "on-policy":
            part = _together(own[name])
            found[name] = part._replace(length=min(most, part.length + answer))
            # Harmful prompts are answered twice, pruned and intact.
            made += own[name] + ([unsafe] if name == "safety" else [])
        else:
            found[name] = clock.pairs(sources, most, table.count)
    safety, general = found["safety"], found["general"]
    if general.number:
        whole = min(safety.number / table.safety_share, general.number / max(1e-9, 1 - table.safety_share))
        whole = min(whole, table.count or whole)
        safety = safety._replace(number=round(whole * table.safety_share))
        general = general._replace(number=round(whole) - safety.number)
    together = _together([safety, general])
    return together._replace(number=min(together.number, table.count or together.number)), _together(made)


def clock_for(
    config: Config, paper: ModelSpec, device: Device, flops: float, bandwidth: str, here: bool
) -> Clock | None:
    """The clock of a device that is ``here``, whose speed is measured, or of one whose speed is given.

    ``None`` for a device that is elsewhere and of unknown speed. Raises ``InputError`` for one figure without the
    other, and for one that is none.
    """
    if bool(flops) != bool(bandwidth):
        raise InputError(
            "a device's speed is two figures, --device-flops and --device-bandwidth, and one of them was given; give "
            "both, or none to have this machine measured"
        )
    if flops:
        said = Speed(flops, parse_bandwidth(bandwidth))
        return Clock(paper, device, said, said)
    if not here:
        return None
    place = device_named(config.model.device)
    precisions = [bytes_per_number(config.model.dtype, device), bytes_per_number(config.align.precision, device)]
    speeds = {b: measured(place, b, paper.shape) for b in set(precisions)}
    computing, training = (speeds[b] for b in precisions)
    return Clock(paper, device, computing, training)


def table_of_times(config: Config, clock: Clock) -> list[str]:
    """What each stage takes, from the time at full speed to ``SLOWER`` times as long, as lines of text."""
    found = list(jobs(config, clock))
    whole = sum(job.times * job.seconds for job in found)
    rows = [["", "times", "each", "work"]]
    rows += [[job.stage, str(job.times), between(job.seconds), job.work] for job in found]
    rows.append(["in all", "", between(whole), ""])
    speed = clock.computing
    memory = f"{speed.bandwidth / 1e12:.3g} TB/s" if speed.bandwidth >= 1e12 else f"{speed.bandwidth / 1e9:.3g} GB/s"
    told = f"{speed.flops / 1e12:.3g} TFLOP/s and {memory}"
    many = f" on each of {clock.device.count} devices" if clock.device.count > 1 else ""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"time, from full speed ({told}{many}) to a quarter of it"]
    lines += [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]) for row in rows
    ]
    beyond = _beyond(config, clock)
    if beyond:
        lines.append(
            f"each pass also moves {beyond / 1e9:,.0f} GB to the device (model.device_map), which is not counted"
        )
    if clock.fetched:
        lines.append(
            f"guessed, since they have yet to be fetched ({ROWS:,} rows of {TOKENS} tokens, or their count): "
            f"{', '.join(clock.fetched)}"
        )
    return [line.rstrip() for line in [*lines, LEFT_OUT]]


def _beyond(config: Config, clock: Clock) -> float:
    """Bytes of weights that the devices do not hold and that have to wait elsewhere."""
    memory = clock.device.memory
    if not config.model.device_map or memory is None or clock.device.kind == "cpu":
        return 0.0
    return max(0.0, bytes_per_number(config.model.dtype, clock.device) * clock.paper.shape.parameters - 0.9 * memory)


def between(seconds: float) -> str:
    """A range of times."""
    return f"{time_words(seconds)} - {time_words(SLOWER * seconds)}"
