"""Finished runs, read for a comparison and written beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeneuron.collecting import verdicts_of
from safeneuron.comparison import Asked, Compared
from safeneuron.config import Config, read_config
from safeneuron.errors import InputError
from safeneuron.runs import Run, key_of, read_json, read_lines, write_json, write_text
from safeneuron.sidebyside import render_comparison
from safeneuron.states import Findings, State

MARKER = "comparison.json"


def write_comparison(folders: Sequence[Path], target: Path) -> list[Path]:
    """Compare finished runs, in this order, and write the files into ``target``; their paths.

    Raises ``InputError`` for a run without a report, the same run twice, or a target that holds something else.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run cannot be compared with itself, but one is named twice; name each run once")
    found = list(target.iterdir()) if target.is_dir() else []
    if found and not (target / MARKER).exists():
        raise InputError(f"{target} holds files but no comparison; give an empty or new folder with --out")
    runs = [compared(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    files = render_comparison(runs)
    write_json(target / MARKER, {"schema": 1, "kind": "comparison", "runs": [str(folder) for folder in folders]})
    for name, text in files.items():
        write_text(target / name, text)
    return [target / name for name in files]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*path[-depth:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def compared(folder: Path, name: str) -> Compared:
    """One finished run as the comparison takes it."""
    run = Run.open(folder)
    if not (folder / "report" / "done.json").exists():
        raise InputError(f"{folder} has no finished report to compare; make it first with: safeneuron report {folder}")
    config = read_config(folder / "config.toml")
    return Compared(name, read_json(folder / "report" / "results.json"), settings_key(config), verdicts(config, run))


def settings_key(config: Config) -> str:
    """The same for two runs that differ in the seed, the name or the look of the report alone."""
    return key_of(config.model_dump(mode="json", exclude={"seed", "name", "report"}))


def verdicts(config: Config, run: Run) -> dict[Asked, dict[str, str]]:
    """Every verdict by state and attack, and in that by the text of the request; of equal requests the first one's."""
    found: dict[Asked, dict[str, str]] = {}
    findings = Findings(config, run)
    for state in findings.states():
        attacks = [(pruning.set, pruning.knowledge) for pruning in findings.prunings(state)]
        attacks += [(which, "adaptive") for which, knowledge in attacks if state.round == 0 and knowledge == "static"]
        for which, knowledge in dict.fromkeys(attacks):
            for kind in ("harmful", "benign"):
                judged = verdicts_of(run, state, kind, which, knowledge)
                prompts = prompts_of(run, state, kind)
                by_text: dict[str, str] = {}
                for index, verdict in judged.items():
                    by_text.setdefault(prompts[index], verdict)
                found[state.name, kind, which, knowledge] = by_text
    return found


def prompts_of(run: Run, state: State, kind: str) -> dict[int, str]:
    """The requests of a kind, as the unpruned state was asked them."""
    lines = read_lines(run.folder / state.name / "attack" / "ORI" / f"{kind}.jsonl")
    return {int(line["index"]): str(line["prompt"]) for line in lines}
