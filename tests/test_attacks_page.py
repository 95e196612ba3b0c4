"""docs/attacks.md runs from its first example to its last, here on the planted model."""

from __future__ import annotations

from pathlib import Path

from safeneuron import data, models
from tests import planted
from tests.test_docs import blocks

PAGE = Path(__file__).parent.parent / "docs" / "attacks.md"


def test_the_examples_are_one_program_that_runs(monkeypatch, capsys):
    twins = dict(zip(("twins:unsafe", "twins:safe"), planted.twins(24), strict=True))
    monkeypatch.setattr(models, "load", lambda name: planted.model())
    monkeypatch.setattr(data, "read_prompts", lambda source, split, count: twins[source][:count])
    names: dict[str, object] = {}
    examples = blocks(PAGE.read_text(encoding="utf-8"), "python")
    assert len(examples) == 5
    for example in examples:
        exec(compile(example, PAGE.name, "exec"), names)
    assert names["found"]["probe at its threshold"] == planted.neurons(names["model"])
    assert "6 attacks on 4 prompts" in capsys.readouterr().out
