"""docs/attacks.md runs from its first example to its last, here on the planted model."""

from __future__ import annotations

from safeneuron.data import prompts
from safeneuron.models import loading
from tests import ROOT
from tests.end_to_end.test_docs import blocks
from tests.helpers import planted

PAGE = ROOT / "docs" / "attacks.md"


def test_the_examples_are_one_program_that_runs(monkeypatch, capsys):
    twins = dict(zip(("twins:unsafe", "twins:safe"), planted.twins(24), strict=True))
    monkeypatch.setattr(loading, "load", lambda name: planted.model())
    monkeypatch.setattr(prompts, "read_prompts", lambda source, split, count: twins[source][:count])
    names: dict[str, object] = {}
    examples = blocks(PAGE.read_text(encoding="utf-8"), "python")
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, PAGE.name, "exec"), names)
    assert names["found"]["probe at its threshold"] == planted.neurons(names["model"])
    assert "neurons pruned: 2 answers" in capsys.readouterr().out
