"""What the stages of one run share: its config, folder and findings, the model loaded last, and who is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeneuron.config.schema import Config
from safeneuron.config.states import State
from safeneuron.models.model import Model
from safeneuron.runs.findings import Findings
from safeneuron.runs.inputs import model_of
from safeneuron.runs.run import Run
from safeneuron.runtime.files import write_json
from safeneuron.runtime.progress import Watcher


class StateModels:
    """The models of a run's states; the last one loaded is kept, so that stages in a row share it."""

    def __init__(self, config: Config, run: Run) -> None:
        self.table = config.model
        self.run = run
        self._kept: tuple[tuple[str, str, str], Model] | None = None

    def load(self, state: State, dtype: str = "", quantise: str = "none") -> Model:
        """The state's model, newly loaded.

        Args:
            state: T0, whose model is the config's, or a trained state.
            dtype: The precision; the config's if empty.
            quantise: How the weights are held, ``none`` for plain ones.
        """
        trained = self.run.folder / state.name / "align" / "model" if state.round else None
        return model_of(self.table, dtype, quantise, trained)

    def of(self, state: State, dtype: str = "", quantise: str = "none") -> Model:
        """The same, kept until another one is asked for; at no time are two of them in memory."""
        key = (state.name, dtype or self.table.dtype, quantise)
        if self._kept is None or self._kept[0] != key:
            self.release()
            self._kept = (key, self.load(state, dtype, quantise))
        return self._kept[1]

    def release(self) -> None:
        """Let go of the model that is kept."""
        self._kept = None


class RunContext:
    """What a stage's work is given: ``config``, ``run``, ``findings``, ``models`` and ``watcher``."""

    def __init__(self, config: Config, run: Run, watcher: Watcher) -> None:
        self.config = config
        self.run = run
        self.watcher = watcher
        self.findings = Findings(config, run)
        self.models = StateModels(config, run)

    def warn(self, folder: Path, warnings: Sequence[str]) -> None:
        """Tell the user, and keep the warnings in the stage's folder for the report."""
        write_json(folder / "warnings.json", {"warnings": list(warnings)})
        for warning in warnings:
            self.watcher.warned(warning)


def weights_stage(state: State) -> list[str]:
    """The stage that made the state's weights, if any."""
    return [f"{state.name}/align"] if state.round > 0 else []
