"""Stages as values, and the one runner for all of them: those of a run, of its analysis and of the red team.

The runner skips a stage that is done, refuses one whose work was made with other settings, and remembers what is
missing where a stage cannot be done yet. With many processes, all of them walk through the same stages: rank 0 decides
what is to be done, and only its files are written; work that computes with the model is done by all ranks together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron.runs.run import Run, Stage
from safeneuron.runtime import distributed
from safeneuron.runtime.devices import hand_back_memory, peak_memory_mb, reporting_shortage, reset_peak_memory
from safeneuron.runtime.progress import Watcher


@dataclass(frozen=True)
class StageSpec:
    """What one stage is: what its work is made with (``settings``) and from (``inputs``), and the work itself.

    Attributes:
        name: The stage's folder inside the run, for example ``T1/attack``.
        settings: What decides the results, JSON values alone; part of the stage's key.
        inputs: The names of the stages that it reads; their keys are part of its own.
        work: Fills the folder that it is given, and goes on with what an interruption has left there.
        together: Whether all ranks do the work, or rank 0 alone.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Sequence[str]
    work: Callable[[Path], None]
    together: bool = False

    @property
    def kind(self) -> str:
        """What the stage does, whichever state it belongs to: ``attack`` of ``T1/attack``."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """The last part of a stage's name."""
    return name.split("/")[-1]


class Runner:
    """Does the stages of one run folder, one after the other.

    Attributes:
        keys: The key of every stage that is done, by name; what later stages may be made from.
        missing: Inputs that were not there when a stage needed them, in the order in which they were missed.
    """

    def __init__(
        self,
        run: Run,
        watcher: Watcher | None = None,
        *,
        kinds: Collection[str] = (),
        keys: Mapping[str, str] | None = None,
        logs: bool = False,
    ) -> None:
        """Start with nothing done.

        Args:
            run: The folder of the run.
            watcher: Who is told; nobody if not given.
            kinds: The only kinds of stage that are done; all if empty.
            keys: Keys of stages that were done elsewhere.
            logs: Whether each stage that is done leaves a line in the run's log.
        """
        self.run = run
        self.watcher = watcher
        self.kinds = kinds
        self.logs = logs
        self.keys = dict(keys or {})
        self.missing: list[str] = []

    def stage_of(self, spec: StageSpec) -> Stage:
        """The stage's folder, with the keys of its inputs, which must be known."""
        return self.run.stage(spec.name, spec.settings, {name: self.keys[name] for name in spec.inputs})

    def check(self, spec: StageSpec, remade: Collection[str] = ()) -> None:
        """Do nothing but ask whether the stage's work, if it has any, was made with these settings.

        Args:
            spec: The stage.
            remade: Names of stages that are about to be made again, whatever they were made with.

        Raises:
            InputError: If it was made with others; names the changed field.
        """
        stage = self.stage_of(spec)
        if spec.name not in remade:
            stage.require_same_settings()
        self.keys[spec.name] = stage.key

    def do(self, spec: StageSpec) -> None:
        """Do the stage unless it is done, not asked for, or cannot be done yet.

        Raises:
            InputError: If work in its folder was made with other settings.
        """
        absent = [name for name in spec.inputs if name not in self.keys]
        if absent:
            self.missing.append(absent[0])
            return
        stage = self.stage_of(spec)
        if distributed.from_main(lambda: stage.done):
            self.keys[spec.name] = stage.key
            if self.watcher is not None:
                self.watcher.ended(spec.name, 0.0, skipped=True)
        elif not self.kinds or spec.kind in self.kinds:
            seconds = self._work(spec, stage)
            self.keys[spec.name] = stage.key
            if self.logs:
                self.run.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {spec.name} done in {seconds:.1f} s")
            if self.watcher is not None:
                self.watcher.ended(spec.name, seconds, skipped=False)

    def _work(self, spec: StageSpec, stage: Stage) -> float:
        """Fill the stage's folder and mark it as done; the seconds that it took."""
        if self.watcher is not None:
            self.watcher.began(spec.name)
        distributed.from_main(stage.start)
        # The peak of memory is to be that of this stage alone.
        hand_back_memory()
        reset_peak_memory()
        begun = time.monotonic()
        with nullcontext() if self.watcher is None else reporting_shortage(self.watcher.warned):
            if spec.together:
                spec.work(stage.folder)
            else:
                distributed.from_main(lambda: spec.work(stage.folder))
        seconds = time.monotonic() - begun
        distributed.from_main(lambda: stage.finish(seconds, peak_memory_mb()))
        return seconds
