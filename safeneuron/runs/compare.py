"""Finished runs held against each other: what the comparison reads of them, and the files that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeneuron.config.schema import Config
from safeneuron.config.states import State
from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.reporting.comparison import Compared, JudgedAttack, render_comparison
from safeneuron.reporting.results import RunResults
from safeneuron.runs.collect import verdicts_of
from safeneuron.runs.findings import Findings
from safeneuron.runs.run import Run
from safeneuron.runtime.files import key_of, read_lines, write_json, write_text

MARKER = "comparison.json"


def write_comparison(folders: Sequence[Path], target: Path) -> list[Path]:
    """Compare finished runs, in this order, and write the files into ``target``; their paths.

    Raises ``InputError`` for a run without a report, the same run twice, or a target that holds something else.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run cannot be compared with itself, but one is named twice; name each run once")
    present = list(target.iterdir()) if target.is_dir() else []
    if present and not (target / MARKER).exists():
        raise InputError(f"{target} holds files but no comparison; give an empty or new folder with --out")
    runs = [compared_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    files = render_comparison(runs)
    write_json(target / MARKER, {"schema": 1, "kind": "comparison", "runs": [str(folder) for folder in folders]})
    for name, text in files.items():
        write_text(target / name, text)
    return [target / name for name in files]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*path[-depth:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def compared_run(folder: Path, name: str) -> Compared:
    """One finished run as the comparison takes it."""
    run = Run.open(folder)
    if not (folder / "report" / "done.json").exists():
        raise InputError(f"{folder} has no finished report to compare; make it first with: safeneuron report {folder}")
    config = read_config(folder / "config.toml")
    return Compared(
        name, RunResults.load(folder / "report" / "results.json"), settings_key(config), verdicts(config, run)
    )


def settings_key(config: Config) -> str:
    """The same for two runs that differ in the seed, the name or the look of the report alone."""
    return key_of(config.model_dump(mode="json", exclude={"seed", "name", "report"}))


def verdicts(config: Config, run: Run) -> dict[JudgedAttack, dict[str, str]]:
    """Every verdict by state and attack, and in that by the text of the request; of equal requests the first one's."""
    by_attack: dict[JudgedAttack, dict[str, str]] = {}
    findings = Findings(config, run)
    for state in findings.states():
        for which, knowledge in [(attack.set, attack.knowledge) for attack in findings.plan(state).attacks]:
            for kind in ("harmful", "benign"):
                judged = verdicts_of(findings, state, kind, which, knowledge)
                prompts = requests_of(run, state, kind)
                by_text: dict[str, str] = {}
                for index, verdict in judged.items():
                    by_text.setdefault(prompts[index], verdict)
                by_attack[state.name, kind, which, knowledge] = by_text
    return by_attack


def requests_of(run: Run, state: State, kind: str) -> dict[int, str]:
    """The requests of a kind, as the unpruned state was asked them."""
    lines = read_lines(run.folder / state.name / "attack" / "ORI" / f"{kind}.jsonl")
    return {int(line["index"]): str(line["prompt"]) for line in lines}
