"""A run from its config: what has to be known before it starts, its stages one after the other, and making some again.

Which stages there are, and in which order, is in ``stages``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from safeneuron.config.schema import Config
from safeneuron.config.states import states_of
from safeneuron.config.toml import to_toml
from safeneuron.errors import InputError, did_you_mean
from safeneuron.evaluation.capability import require_benchmarks
from safeneuron.planning.plan import plans_for
from safeneuron.runs.attackers import require_given
from safeneuron.runs.context import RunContext
from safeneuron.runs.run import Run
from safeneuron.runs.runner import Runner, kind_of
from safeneuron.runs.stages import KINDS_OF_VERB, stages_of, verb_for
from safeneuron.runtime.devices import reuse_memory
from safeneuron.runtime.files import read_json, write_text
from safeneuron.runtime.progress import Watcher
from safeneuron.training.settings import TrainingSettings, require_trainable_settings


class Pipeline:
    """The stages of one run."""

    def __init__(self, config: Config, run: Run, watcher: Watcher, verb: str = "") -> None:
        """Look at nothing yet.

        Args:
            config: All settings.
            run: The run's folder.
            watcher: Who is told how it goes on.
            verb: Limits the work to the stages of one verb of the command line (``safeneuron measure RUN``).
        """
        self.config = config
        self.watcher = watcher
        self.run = run
        self.runner = Runner(run, watcher, kinds=KINDS_OF_VERB[verb] if verb else (), logs=True)

    def execute(self) -> None:
        """Do whatever is not done yet, in order.

        Raises:
            InputError: For whatever a user can mend: a file that is missing, other settings than before, a full disk.
        """
        _require_files(self.config)
        for spec in stages_of(RunContext(self.config, self.run, self.watcher)):
            self.runner.do(spec)
            if spec.name == "data":
                reuse_memory()
                _require_trainable(self.config)
                self._foresee()

    def require_work(self) -> None:
        """Raise ``InputError`` if a verb was asked for whose inputs are not there yet, naming the one to give first."""
        kinds = self.runner.kinds
        if any(not kinds or (kind_of(name) in kinds and kind_of(name) != "data") for name in self.runner.keys):
            return
        if not self.runner.missing:
            raise InputError("there is nothing to train: align.rounds is 0 and the config has no variants; change it")
        missing = self.runner.missing[0]
        command = shlex.join(["safeneuron", verb_for(missing), str(self.run.folder)])
        raise InputError(f"{missing} has not been made yet; do it first with: {command}")

    def _foresee(self) -> None:
        """Say what the trainings ahead will need in memory, and end now if it can be no way that they fit."""
        trained = [state for state in states_of(self.config) if state.round > 0]
        waiting = [state for state in trained if not (self.run.folder / state.name / "align" / "done.json").exists()]
        if waiting and (not self.runner.kinds or "align" in self.runner.kinds):
            for name, plan in plans_for(self.config, waiting).items():
                self.watcher.noted(f"{name}/align will need about {plan.sentence()}")


def _require_files(config: Config) -> None:
    """Read what is given in files, so that a mistake is told before all work."""
    if config.capability.enabled:
        require_benchmarks(config.capability.tasks, config.capability.folder)
    require_given(config)


def _require_trainable(config: Config) -> None:
    for state in states_of(config):
        if state.round > 0:
            table = config.variant(state.variant)
            require_trainable_settings(TrainingSettings.of(table, config.seed), table.refresh > 0)


def prepare(config: Config, run: Run, watcher: Watcher, redo: Sequence[str] = ()) -> list[str]:
    """Make a run ready to be executed with this config, and return the names of the stages deleted for that.

    Args:
        config: All settings; written into the run's folder.
        run: The run's folder.
        watcher: Who is told of warnings.
        redo: Stages (``T1/attack``) or kinds (``attack``) to delete, with everything made from them.

    Returns:
        The deleted stages, each before those that it was made from.

    Raises:
        InputError: For a name that no stage has, or if the work of another stage was made with other settings; then
            nothing has been changed.
    """
    doomed = _made_from(run, redo)
    _require_files(config)
    checker = Runner(run)
    for spec in stages_of(RunContext(config, run, watcher)):
        checker.check(spec, doomed)
        if spec.name == "data":
            _require_trainable(config)
    for name in doomed:
        run.remove(name)
    write_text(run.folder / "config.toml", to_toml(config))
    return doomed


def _made_from(run: Run, names: Sequence[str]) -> list[str]:
    """The named stages and all that were made from them; each stands before those that it was made from."""
    present = {str(path.parent.relative_to(run.folder)) for marker in ("done.json", "started.json")
               for path in run.folder.rglob(marker)}  # fmt: skip
    doomed: set[str] = set()
    for wanted in names:
        meant = {name for name in present if wanted in (name, name.split("/")[-1])}
        if not meant:
            known = ", ".join(sorted(present)) or "none yet"
            raise InputError(
                f"--redo {wanted}: the run has no such stage{did_you_mean(wanted, present)}; it has {known}"
            )
        doomed |= meant
    inputs = {name: _inputs_of(run, name) for name in present}
    while more := {name for name in present - doomed if inputs[name] & doomed}:
        doomed |= more
    ordered: list[str] = []
    while doomed:
        last = min(name for name in doomed if not any(name in inputs[other] for other in doomed))
        ordered.append(last)
        doomed.remove(last)
    return ordered


def _inputs_of(run: Run, name: str) -> set[str]:
    for marker in ("done.json", "started.json"):
        if (run.folder / name / marker).exists():
            return set(read_json(run.folder / name / marker)["inputs"])
    return set()
