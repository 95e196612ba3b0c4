"""What test_distributed.py starts in several processes: each writes down what it saw, and the tests judge it.

``python -m tests.programs.ranks_program functions FOLDER`` calls the package's functions, with FSDP2 for the training.
``python -m tests.programs.ranks_program cli FOLDER FAULT ARGUMENTS...`` is the program with a fault in rank 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeneuron.models.forward import MeasurementSettings
from safeneuron.runtime import distributed

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What ``accelerate launch`` puts into the environment for FSDP2."""


class Judge:
    """Finds every answer usable; remembers how often it was asked."""

    name = "judge"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        self.asked += 1
        return ["complied" if response.strip() else "incoherent" for response in responses]


def said(work: Callable[[], object]) -> object:
    """What comes out, or what the InputError says."""
    from safeneuron.errors import InputError

    try:
        return work()
    except InputError as error:
        return str(error)


# -- what the functions give; also called by the tests, in their one process ------------------------------------------


def computed() -> dict[str, Any]:
    """Everything that must not depend on the number of processes."""
    import torch

    from safeneuron.attacks.pruning import attack, perplexity, respond
    from safeneuron.data.prompts import benign_text
    from safeneuron.data.types import Prompt
    from safeneuron.neurons.neuron_set import NeuronSet
    from safeneuron.selection.measurement import measure
    from safeneuron.selection.scores import score
    from safeneuron.training.on_policy import on_policy_pairs
    from tests.helpers import tiny

    model = tiny.model()
    unsafe = [Prompt(f"how to break {'it ' * (number % 4)}{number}") for number in range(7)]
    safe = [Prompt(f"how to bake {'it ' * (number % 3)}{number}") for number in range(5)]
    half = NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)
    facts: dict[str, Any] = {}
    facts["progress"] = []
    for name, batch_tokens in (("many batches", 1), ("few batches", 10**6)):
        stats = measure(
            model,
            unsafe,
            safe,
            MeasurementSettings(batch_tokens=batch_tokens),
            progress=lambda *now: facts["progress"].append(now),
        )
        scores = score(stats)
        facts[name] = {
            "counts": [stats.unsafe.count, stats.safe.count],
            "scores": [one.tolist() for one in (scores.d, scores.shift, scores.z, scores.t, scores.q)],
        }
    for skip in (0, 2):
        facts[f"answers from {skip}"] = [
            [one.to_record() for one in batch]
            for batch in respond(model, unsafe, max_new_tokens=6, batch_size=2, skip=skip)
        ]
    facts["perplexity"] = perplexity(model, benign_text()[:300], window=64)
    judge = Judge()
    found = attack(model, half, unsafe, judge, max_new_tokens=6, batch_size=2)
    facts["attack"] = [[one.to_record() for one in found.responses], found.verdicts, found.success.count]
    pairs = on_policy_pairs(model, unsafe, safe, half, judge, max_new_tokens=6, batch_size=2)
    facts["pairs"] = [pair.to_record() for pair in pairs]
    model.network.get_input_embeddings().weight.data[model.tokenizer("z").input_ids[0]] = torch.nan
    bad = [Prompt("x" * 30), Prompt("z" * 20), Prompt("x")]
    facts["not finite"] = said(lambda: measure(model, bad, safe, MeasurementSettings(batch_tokens=1)))
    return json.loads(json.dumps({**facts, "judged": judge.asked}))


def aligned(folder: Path) -> dict[str, Any]:
    """Two rounds of training, the second one interrupted and continued; the model that comes out, and the proof."""
    import torch

    from safeneuron.data.types import Pair
    from safeneuron.neurons.layout import fingerprint
    from safeneuron.neurons.neuron_set import NeuronSet
    from safeneuron.training.ablation import Ablation
    from safeneuron.training.alignment import align
    from safeneuron.training.settings import TrainingSettings
    from tests.helpers import tiny

    pairs = [
        Pair(({"role": "user", "content": f"question {n}"},), f"No, not {n * 3}.", f"Sure, step {n * 7}.", "test")
        for n in range(8)
    ]
    training = TrainingSettings(
        learning_rate=1e-2, epochs=2, batch_size=4, micro_batch_size=2, max_length=64, precision="float32",
        gradient_checkpointing=True, save_every=1,
    )  # fmt: skip
    facts: dict[str, Any] = {}
    model = tiny.model()
    frozen = NeuronSet.of({0: [1, 5], 1: range(0, 48, 5), 2: [47]}, model.widths, model.fingerprint)
    half = NeuronSet.of({layer: range(0, 48, 2) for layer in range(3)}, model.widths, model.fingerprint)
    first = align(model, pairs, frozen, training, ablation=Ablation(half, reference=True))

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    for attempt in (1, 2):
        try:
            second = align(
                first.model, pairs, frozen, training, checkpoints=folder, progress=stop if attempt == 1 else None
            )
        except KeyboardInterrupt:
            facts["checkpoints"] = sorted(path.parent.name for path in folder.glob("checkpoint-*/complete"))
    for name, result in (("first", first), ("second", second)):
        weights = [weight.detach().numpy().tobytes() for weight in result.model.network.parameters()]
        facts[name] = {
            "losses": [entry["loss"] for entry in result.log],
            "free_change": result.free_change,
            "identical": result.frozen_identical,
            "frozen": [result.frozen_count, result.frozen_sha256],
            "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
            "plain": all(type(weight) is torch.nn.Parameter for weight in result.model.network.parameters()),
            "fingerprint": fingerprint(result.model.network),
        }
    half_precision = align(model, pairs, frozen, replace(training, precision="bfloat16", learning_rate=1e-3))
    facts["bfloat16"] = [entry["loss"] for entry in half_precision.log]
    second.model.save(folder / "model")
    distributed.barrier()
    return facts


# -- what only several processes have ---------------------------------------------------------------------------------


def exchanged() -> dict[str, Any]:
    """What each rank hears from the others."""
    import torch

    from safeneuron.errors import InputError
    from safeneuron.training.settings import TrainingSettings

    me = distributed.rank()

    def refuse() -> None:
        raise InputError("rank 0 says no")

    with distributed.alone():
        alone = [
            distributed.world(),
            distributed.rank(),
            distributed.is_main(),
            distributed.gather(me),
            list(distributed.deal([1, 2, 3], str)),
        ]
    return {
        "rank": [me, distributed.world(), distributed.local_rank(), distributed.is_main()],
        "gathered": distributed.gather({"rank": me}),
        "dealt": list(distributed.deal([10, 20, 30], lambda item: [item, me])),
        "from main": distributed.from_main(lambda: [distributed.rank(), distributed.world(), os.getpid()]),
        "refused": said(lambda: distributed.from_main(refuse)),
        "agreed": said(lambda: distributed.agree("second" if me else "")),
        "large": [len(text) for text in distributed.gather("é" * (2**21 + me))],
        "tensors": [tensor.tolist() for tensor in distributed.each_tensor(torch.tensor([float(me), 0.5]))],
        "alone": alone,
        "micro-batches": [said(TrainingSettings(batch_size=batch, micro_batch_size=micro).micro_batch)
                          for batch, micro in ((8, 8), (8, 2), (24, 8), (6, 2), (3, 3))],
    }  # fmt: skip


def loaded(folder: Path) -> float:
    """The size of the weights of a model that every rank loads, with accelerate told to let only one read them."""
    from safeneuron.models.loading import load

    network = load(folder, "float32").network
    return float(sum(weight.detach().double().square().sum() for weight in network.parameters()))


AUDIT = (
    "align.rounds=0", "variants={}", 'attack.selectors=["probe", "snip", "wanda", "gradient"]',
    'attack.operators=["opposite"]', 'attack.attempts=["direction", "prefill-sure"]',
)  # fmt: skip
"""What is changed in the config for a run without training that makes many kinds of attack."""


def audited(config: Path, folder: Path) -> list[object]:
    """A run without training, by all ranks; the stages that began, here."""
    from safeneuron.config.toml import read_config
    from safeneuron.runs.pipeline import Pipeline, prepare
    from safeneuron.runs.run import Run
    from tests.helpers.tiny_run import Watch

    settings, run, watch = read_config(config, AUDIT), Run.create(folder), Watch()
    with run.locked():
        distributed.from_main(lambda: prepare(settings, run, watch))
        Pipeline(settings, run, watch).execute()
    return watch.of("began")


def functions(folder: Path) -> None:
    """Write ``facts-RANK.json``."""
    from accelerate.state import DistributedType, PartialState

    from safeneuron.training import alignment

    facts: dict[str, Any] = {"exchanged": exchanged(), "computed": computed()}
    facts["audit"] = audited(folder / "tiny.toml", folder / "audit")
    # accelerate shards only on GPUs, so it is told that these are some; the rest of FSDP2 is the real one.
    os.environ.update(FSDP2)
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    gathered, sharded = alignment.gathered, []
    alignment.gathered = lambda trained, *rest: sharded.append(type(trained).__name__) or gathered(trained, *rest)
    facts["aligned"] = aligned(folder / "checkpoints")
    facts["sharded"] = sharded
    facts["loaded"] = loaded(folder / "checkpoints" / "model")
    (folder / f"facts-{distributed.rank()}.json").write_text(json.dumps(facts))
    distributed.leave()


# -- the program with a fault -----------------------------------------------------------------------------------------


def cli(folder: Path, fault: str, arguments: list[str]) -> None:
    """Run the program, with the fault in rank 1; write the exit code of each rank into ``exit-RANK``."""
    from safeneuron.cli.app import main

    if distributed.rank() == 1:
        FAULTS[fault]()
    sys.argv = ["safeneuron", *arguments]
    try:
        main()
    except SystemExit as end:
        (folder / f"exit-{os.environ['RANK']}").write_text(str(end.code))
        raise


def _interrupt_while_answering() -> None:
    """Ctrl-C reaches rank 1 when it has the first two answers, while rank 0 goes on to the third."""
    from safeneuron.runtime import files

    calls: list[Path] = []

    def interrupted(path: Path, _: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    files.append_lines = interrupted


def _fail_while_training() -> None:
    """Rank 1 finds a mistake after its second step, while rank 0 goes on to the third and waits for its gradients."""
    from safeneuron.errors import InputError
    from safeneuron.training.settings import Watch

    on_step_end = Watch.on_step_end

    def failing(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        if state.global_step == 3:
            raise InputError("rank 1 has found a mistake")

    Watch.on_step_end = failing


FAULTS: dict[str, Callable[[], None]] = {"interrupt": _interrupt_while_answering, "mistake": _fail_while_training}


if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    if kind == "functions":
        functions(Path(place))
    else:
        cli(Path(place), rest[0], rest[1:])
