"""The tables of attacks and judges."""

from safeneuron.config.schema import Config
from safeneuron.config.toml import parse_config, to_toml


def test_judges_are_one_or_several_and_only_what_decides_the_verdicts_counts():
    one = parse_config("[judge]\nname = 'refusal-embedding'\ntimeout = 3", "x").judge
    assert (one.names, one.label, one.settings()) == (
        ("refusal-embedding",), "refusal-embedding", {"name": "refusal-embedding"},
    )  # fmt: skip
    text = "[judge]\nname = ['wildguard', 'rubric']\nrule = 'any'\nurl = 'http://h/v1'\nmodel = 'm'\nretries = 0"
    several = parse_config(text, "x").judge
    assert several.label == "any of wildguard, rubric"
    assert several.settings() == {"name": ["wildguard", "rubric"], "rule": "any", "url": "http://h/v1", "model": "m"}
    assert parse_config(to_toml(Config(judge=several)), "x").judge == several
