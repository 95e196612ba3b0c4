"""Times that follow from the seconds of a run: of the same config, of one that differs, and of none."""

from __future__ import annotations

import json
import shlex
import time
from math import isnan
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safeneuron.cli.app import app
from safeneuron.config.schema import Config
from safeneuron.config.states import states_of
from safeneuron.config.toml import read_config, to_toml
from safeneuron.errors import InputError
from safeneuron.planning.duration import NOTE, TimeRecord, table_of_times
from tests import ROOT
from tests.helpers import tiny
from tests.helpers.large import seventy_billion
from tests.helpers.tiny_run import execute, write_world

SECONDS = {
    "T0/measure": 10.0, "T0/select": 1.0, "T0/iterate": 20.0, "T0/attack": 60.0, "T0/judge": 2.0, "T0/pairs": 5.0,
    "T1/align": 100.0, "T1/measure": 12.0, "T1/attack": 90.0, "T2/align": 140.0,
}  # fmt: skip


def recorded(folder: Path, config: Config, seconds: dict[str, float] = SECONDS) -> TimeRecord:
    """The record of a run whose finished stages took so long."""
    for name, taken in seconds.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "done.json").write_text(json.dumps({"seconds": taken}))
    (folder / "config.toml").write_text(to_toml(config))
    return TimeRecord.read(folder)


def forecast(record: TimeRecord, config: Config, number: int, kind: str) -> float:
    """Seconds of a stage of the state of that number."""
    state = states_of(config)[number]
    return record.forecast(state, kind, record.ratios(config, state.variant))


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The cells of each row of the table, by its first one."""
    cells = [line.replace("in all", "all").split() for line in lines[3:-2]]
    return {first: others for first, *others in cells}


def test_a_stage_takes_what_it_took_and_a_new_one_the_mean_of_its_kind(tmp_path):
    config = read_config(write_world(tmp_path))
    lines = table_of_times(config, recorded(tmp_path / "run", config))
    assert lines[0] == f"time, by the 10 finished stages of {tmp_path / 'run'} (7.3 min)"
    assert lines[-1] == NOTE
    found = rows(lines)
    # T0, T1, T2 and dpo-T1; of attacks and measurements of trained states those count that are of trained states.
    assert found["measure"] == ["4", "12", "s", "46", "s"]
    assert found["attack"] == ["4", "82", "s", "5.5", "min"]
    assert found["align"] == ["3", "2.0", "min", "6.0", "min"]
    assert found["pairs"] == ["1", "5.0", "s", "5.0", "s"]
    assert found["all"] == ["14", "min"]
    assert "rivals" not in found
    assert "capability" not in found


@pytest.mark.parametrize(
    ("change", "kind", "factor"),
    [
        ("align.epochs=4.5", "align", 3),
        ("pairs.count=3", "align", 1 / 2),
        ("attack.max_new_tokens=6", "attack", 2),
        ("attack.searches=4", "iterate", 3),
        ("judge.timeout=3.0", "judge", 1),
    ],
)
def test_work_is_in_proportion(tmp_path, change, kind, factor):
    path = write_world(tmp_path)
    record = recorded(tmp_path / "run", read_config(path))
    config = read_config(path, [change])
    assert forecast(record, config, 1, kind) == pytest.approx(factor * forecast(record, record.config, 1, kind))


def test_prompts_and_weights_are_counted(tmp_path):
    path = write_world(tmp_path)
    record = recorded(tmp_path / "run", read_config(path))
    config = read_config(path, [f"data.safe=[{{path='{tmp_path}/test_safe.jsonl'}}]"])
    assert forecast(record, config, 0, "measure") == 10.0 * 9 / 12
    tiny.model(layers=4).save(tmp_path / "deeper")
    deeper = read_config(path, [f'model.name="{tmp_path / "deeper"}"'])
    assert forecast(record, deeper, 0, "attack") == pytest.approx(60 * 4 / 3)
    assert forecast(record, deeper, 0, "judge") == 2.0


def test_what_nothing_says_is_unknown(tmp_path):
    path = write_world(tmp_path)
    record = recorded(tmp_path / "run", read_config(path), {"T0/attack": 60.0})
    lines = table_of_times(record.config, record)
    assert rows(lines)["attack"] == ["4", "60", "s", "4.0", "min"]
    assert rows(lines)["align"] == ["3", "unknown", "unknown"]
    assert rows(lines)["all"] == ["unknown"]
    unfetched = read_config(path, ["data.test_unsafe=[{path='strongreject'}]"])
    assert isnan(forecast(record, unfetched, 0, "attack"))


def test_a_real_run_forecasts_itself(tmp_path):
    config = read_config(write_world(tmp_path), ["variants={}", "align.rounds=1"])
    execute(config, tmp_path / "run", verb="measure")
    record = TimeRecord.read(tmp_path / "run")
    assert list(record.seconds) == ["T0/measure"]
    assert rows(table_of_times(config, record))["measure"][0] == "2"


def test_a_model_of_another_order_of_size_is_not_extrapolated(tmp_path):
    path = write_world(tmp_path)
    record = recorded(tmp_path / "run", read_config(path))
    seventy_billion(tmp_path / "large")
    (line,) = table_of_times(read_config(path, [f'model.name="{tmp_path / "large"}"']), record)
    assert "unknown" in line
    assert "size" in line


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="config"):
        TimeRecord.read(tmp_path)


def test_the_print_in_the_documentation_is_the_commands_own(tmp_path, monkeypatch):
    """And takes seconds, with no weights to read."""
    seventy_billion(tmp_path / "llama-70b")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    command, *printed = page.partition("$ safeneuron ")[2].partition("\n```")[0].splitlines()
    begun = time.process_time()
    result = CliRunner().invoke(app, shlex.split(command))
    assert time.process_time() - begun < 10
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == printed
