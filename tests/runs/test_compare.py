"""Finished runs read for a comparison: their verdicts, their names, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safeneuron.cli.app import app
from safeneuron.errors import InputError
from safeneuron.runs.compare import compared_run, run_names, write_comparison


@pytest.fixture
def runs(finished_run, tmp_path) -> list[Path]:
    """A finished run, and a copy of it with another seed in its config and results."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("*.safetensors", "checkpoints"))
        for scores in finished_run[0].rglob("scores.safetensors"):
            shutil.copy(scores, folder / scores.relative_to(finished_run[0]))
    config = folders[1] / "config.toml"
    config.write_text(config.read_text().replace("seed = 0\n", "seed = 7\n"))
    results = json.loads((folders[1] / "report" / "results.json").read_text())
    (folders[1] / "report" / "results.json").write_text(json.dumps({**results, "seed": 7}))
    return folders


def test_runs_that_differ_in_the_seed_alone_share_a_key_and_all_verdicts_are_read(runs) -> None:
    first, second = (compared_run(folder, folder.name) for folder in runs)
    assert first.settings == second.settings
    assert first.verdicts == second.verdicts
    states = {state.name: state for state in first.results.states}
    assert states
    for (state, kind, which, knowledge), found in first.verdicts.items():
        if kind != "harmful" or knowledge == "curve":
            continue
        attack = states[state].attack(which, knowledge)
        assert attack is not None
        assert attack.harmful is not None
        assert list(found.values()).count("complied") == attack.harmful.complied
        assert len(found) == attack.harmful.n


def test_the_command_writes_the_comparison_beside_the_runs(runs) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, runs)])
    assert done.exit_code == 0, done.output
    target = runs[0].parent / "comparison"
    assert done.stdout.splitlines() == [f"wrote {target}/comparison.html", f"wrote {target}/comparison.md"]
    assert (target / "tables" / "seeds.csv").read_text().startswith("runs,state,set,knowledge,seeds,n,rate")
    again = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(target)])
    assert again.exit_code == 0, "its own folder may be written again"


def test_what_cannot_be_compared_is_refused(runs, tmp_path) -> None:
    with pytest.raises(InputError, match="named twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(InputError, match="holds files but no comparison"):
        write_comparison(runs, runs[0])
    (runs[1] / "report" / "done.json").unlink()
    with pytest.raises(InputError, match="make it first with: safeneuron report"):
        write_comparison(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--redo", "report"])
    assert done.exit_code == 2
    assert "--set and --redo belong to one run" in done.stderr


def test_names_are_the_shortest_that_tell_the_runs_apart() -> None:
    assert run_names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert run_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]
