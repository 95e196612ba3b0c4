"""What is drawn on the terminal: bars, tables, warnings in one line."""

import io

import pytest
from rich.console import Console

from safeneuron.cli import console
from safeneuron.config.toml import parse_config
from tests.helpers.command_line import invoke


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 120 columns that keeps what is drawn."""
    drawn = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console, "out", drawn)
    return drawn


def test_a_bar_estimates_the_time_left_also_when_steps_are_slow(terminal):
    clock = [0.0]
    bars = console.Bars()
    bars.bars.get_time = lambda: clock[0]
    bars.began("T1/attack")
    for step in (1, 2, 3):
        clock[0] = 200.0 * step
        bars.progress(step, 10)
    (task,) = bars.bars.tasks
    assert task.time_remaining == 7 * 200
    bars.ended("T1/attack", 600.0, skipped=False)
    assert bars.bars.tasks == []
    assert "T1/attack: done in 600.0 s" in terminal.file.getvalue()


def test_without_a_terminal_a_stage_is_two_lines(capsys):
    bars = console.Bars()
    bars.began("T0/measure")
    bars.progress(1, 2)
    bars.ended("T0/measure", 1.25, skipped=False)
    bars.ended("T0/select", 0.0, skipped=True)
    assert capsys.readouterr().out.splitlines() == [
        "T0/measure ...", "T0/measure: done in 1.2 s", "T0/select: done before, skipped",
    ]  # fmt: skip


def test_a_table_has_its_numbers_on_the_right(terminal):
    console.print_table("A [title]", ["name", "n"], [["x", "1"], ["longer", "22"]])
    lines = [line.rstrip() for line in terminal.file.getvalue().splitlines()]
    assert "A [title]" in lines[1]
    assert lines[-2:] == ["x        1", "longer  22"]


@pytest.mark.parametrize("text", ["plain", 'a "quoted" name', "back\\slash"])
def test_texts_are_toml_strings(text):
    config = parse_config(f"name = 'x'\n[model]\nname = {console.toml_string(text)}", "x")
    assert config.model.name == text


def test_an_old_name_in_a_config_is_said_in_one_line(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text('[model]\nname = "nothing/here"\n[measure]\npart = "eyes"\npooling = "mean"\n[align]\nrounds = 0\n')
    lines = invoke("run", path, "--out", path).stderr.splitlines()
    assert [line for line in lines if "vision" in line] == [
        "warning: measure.part = 'eyes' is now called 'vision'; change it"
    ]
