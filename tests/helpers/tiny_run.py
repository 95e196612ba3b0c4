"""A whole run on a tiny random model: its files, its config, and a watcher that can stop it anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safeneuron.config.schema import Config
from safeneuron.config.toml import read_config
from safeneuron.runs.pipeline import Pipeline, prepare
from safeneuron.runs.run import Run
from tests.helpers import tiny

CONFIG = """
name = "tiny"

[model]
name = "{folder}/model"
dtype = "float32"

[data]
unsafe = [{{ path = "{folder}/unsafe.jsonl" }}]
safe = [{{ path = "{folder}/safe.jsonl" }}]
test_unsafe = [{{ path = "{folder}/test_unsafe.jsonl" }}]
test_safe = [{{ path = "{folder}/test_safe.jsonl" }}]

[select]
density = 0.05

[pairs]
safety = [{{ path = "{folder}/pairs.jsonl" }}]

[align]
rounds = 2
learning_rate = 1e-3
epochs = 1.5
batch_size = 2
micro_batch_size = 1
save_every = 1

[attack]
max_new_tokens = 3
batch_size = 2
sets = ["ES", "FULL"]
knowledge = ["static", "adaptive", "iterated"]
searches = 2
curve = [0.02]

[judge]
name = "refusal-phrases"

[variants.dpo]
rounds = 1
freeze = "none"
"""


STATES = ("T0", "T1", "T2", "dpo-T1")
"""The states of the config, in order."""
SMALL = (
    'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.random=false", "attack.curve=[]", "variants={}",
    "align.rounds=1",
)  # fmt: skip
"""Changes that leave one round of one training, and one attack."""


class AnswersJudge:
    """A judge that finds every answer usable, but for the first two of a list, of which it cannot say anything."""

    name = "answers"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return ["cannot say", "cannot say", *["complied"] * (len(responses) - 2)]


def write_world(folder: Path) -> Path:
    """Write a tiny model, prompts and pairs into ``folder``, and the config that uses them; the config's path."""
    tiny.model().save(folder / "model")
    for kind, verb in (("unsafe", "break"), ("safe", "bake")):
        _write(folder / f"{kind}.jsonl", [{"prompt": f"how to {verb} " + "it " * (i % 3) + str(i)} for i in range(6)])
        _write(folder / f"test_{kind}.jsonl", [{"prompt": f"{verb} number {i}"} for i in range(3)])
    pairs = [{"prompt": f"how to do {i}", "chosen": f"No, not {i}.", "rejected": f"Yes, {i}."} for i in range(6)]
    _write(folder / "pairs.jsonl", pairs)
    config = folder / "tiny.toml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def _write(path: Path, records: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Watch:
    """Remembers what happened; raises ``KeyboardInterrupt`` once ``stop_after`` events have been seen."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.events: list[tuple[object, ...]] = []

    def began(self, stage: str) -> None:
        self._note("began", stage)

    def progress(self, done: int, total: int) -> None:
        self._note("progress", done, total)

    def ended(self, stage: str, seconds: float, skipped: bool) -> None:
        if skipped:
            self.events.append(("skipped", stage))
        else:
            self._note("ended", stage)

    def noted(self, text: str) -> None:
        self.events.append(("noted", text))

    def warned(self, text: str) -> None:
        self.events.append(("warned", text))

    def of(self, kind: str) -> list[object]:
        """What has been told under this heading, for example the names of the stages that began."""
        return [event[1] for event in self.events if event[0] == kind]

    def _note(self, *event: object) -> None:
        self.events.append(event)
        done = sum(kind not in ("skipped", "noted", "warned") for kind, *_ in self.events)
        if self.stop_after is not None and done > self.stop_after:
            raise KeyboardInterrupt


def execute(
    config: Config | Path,
    folder: Path,
    watch: Watch | None = None,
    redo: Sequence[str] = (),
    verb: str = "",
    changes: Sequence[str] = (),
) -> Watch:
    """What ``safeneuron run`` does, without its output."""
    settings = config if isinstance(config, Config) else read_config(config, changes)
    watch = watch or Watch()
    run = Run.create(folder)
    with run.locked():
        prepare(settings, run, watch, redo)
        pipeline = Pipeline(settings, run, watch, verb)
        pipeline.execute()
        pipeline.require_work()
    return watch


def stages_in(folder: Path) -> set[str]:
    """The names of the finished stages of a run."""
    return {str(marker.parent.relative_to(folder)) for marker in folder.rglob("done.json")}


def results(folder: Path) -> bytes:
    """The bytes of a run's results."""
    return (folder / "report" / "results.json").read_bytes()
