"""Every setting can be written and read again, from files, presets and the command line."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from safeneuron.config import align, attack, schema
from safeneuron.config import tables as tables_module
from safeneuron.config.schema import Config
from safeneuron.config.tables import SettingsTable
from safeneuron.config.toml import parse_config, presets, read_config, to_toml
from safeneuron.errors import InputError
from tests.helpers.configs import refusal


def test_the_presets():
    assert {"default", "demo", "audit", "paper-llama", "paper-qwen"} <= set(presets())


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("comments", [True, False])
def test_a_preset_printed_and_read_again_is_the_same(name, comments):
    config = read_config(name)
    again = parse_config(to_toml(config, comments), "printed")
    assert again == config
    assert to_toml(again, comments) == to_toml(config, comments)


def keys_of(table: BaseModel, prefix: str = "") -> dict[str, object]:
    """Every key of a config, by dotted name, with its value."""
    found: dict[str, object] = {}
    for name in type(table).model_fields:
        value = getattr(table, name)
        found |= keys_of(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": value}
    return found


@pytest.mark.parametrize("name", presets())
def test_a_printed_config_is_complete(name):
    config = read_config(name)
    text = to_toml(config)
    # A key without a value cannot be written in TOML: it stands in a comment, ready to be filled in.
    read = tomllib.loads("".join(line.removesuffix(" =") + "\n" if line.endswith(" =") else line + "\n"
                                 for line in text.split("\n")))  # fmt: skip
    for key, value in keys_of(config).items():
        if key == "variants":
            continue
        *tables, last = key.split(".")
        table = read
        for part in tables:
            table = table[part]
        assert (last in table) == (value is not None), key
        assert value is not None or f"\n# {last} =\n" in text


def test_every_key_has_a_description_and_the_printed_config_shows_it():
    text = to_toml(Config())
    tables = {
        kind
        for module in (align, attack, schema, tables_module)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, SettingsTable)
    }
    assert len(tables) > 10
    for table in tables:
        for name, field in table.model_fields.items():
            assert field.description, f"{table.__name__}.{name}"
            if not table.__name__.endswith("SourceTable"):
                assert f"# {field.description}\n" in text + "\n"
    bare = [line for line in to_toml(Config(), comments=False).splitlines() if line.startswith("#")]
    assert all(line.endswith(" =") for line in bare), "without comments only keys without a value are commented out"


@given(label=st.text(), path=st.text(min_size=1), rate=st.floats(1e-300, 1e300), count=st.integers(1, 10**15))
def test_any_value_survives_being_printed(label, path, rate, count):
    config = Config.model_validate(
        {
            "align": {"label": label, "learning_rate": rate},
            "data": {"unsafe": [{"path": path, "count": count}]},
            "variants": {"x": {"label": label, "ablate": True, "beta": rate}},
        }
    )
    assert parse_config(to_toml(config), "printed") == config


def test_a_file_goes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("demo").name == "demo"
    Path("demo").write_text('name = "mine"')
    assert read_config("demo").name == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere.toml", "No such file"), ("dmeo", "did you mean 'demo'"), (".", "Is a directory"), ("latin", "UTF-8")],
)
def test_a_config_that_cannot_be_read(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b'name = "\xe4"')
    with pytest.raises(InputError, match=said) as error:
        read_config(name)
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)


def test_malformed_toml_names_the_line():
    assert "line 3" in refusal('name = "x"\n[align]\nrounds = = 2\n')
    assert "line 2" in refusal("seed = 1\nseed = 2\n")


def test_changes_are_read_as_toml_or_as_text():
    config = parse_config(
        "[align]\nrounds = 1",
        "x",
        [
            "align.rounds=3",
            "align.learning_rate=2e-5",
            "align.ablate=true",
            "align.freeze=random",
            'align.label="a = b"',
            "model.name=org/name-1.5",
            "attack.sets=['ES']",
            "pairs.safety=[{path='p.jsonl'}]",
            "variants.dpo.freeze=none",
            "seed=7",
            "report.examples=1",
            "report.examples=2",
        ],
    )
    assert (config.align.rounds, config.align.learning_rate, config.align.ablate) == (3, 2e-5, True)
    assert (config.align.freeze, config.align.label) == ("random", "a = b")
    assert (config.model.name, config.attack.sets, config.seed) == ("org/name-1.5", ("ES",), 7)
    assert config.pairs.safety[0].path == "p.jsonl"
    assert config.variant("dpo").freeze == "none"
    assert config.report.examples == 2, "the last one wins"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("align.rounds", "expects table.key=value"),
        ("=3", "expects table.key=value"),
        ("align.rounds=many", "align.rounds = 'many'"),
        ("align.round=2", "did you mean 'rounds'?"),
        ("seed.x=2", "'seed' is a value, not a table"),
        ("align=2", "table"),
        ("align..rounds=2", "unknown key"),
    ],
)
def test_bad_changes_are_one_sentence(change, said):
    assert said in refusal("seed = 1", change)


def test_the_paper_presets_hold_the_papers_numbers():
    for name, effect in (("paper-qwen", 3.0), ("paper-llama", 2.0)):
        config = read_config(name)
        assert (config.select.effect_size, config.select.shift) == (effect, 2.0)
        align = config.align
        assert (align.beta, align.learning_rate, align.weight_decay, align.epochs) == (0.1, 5e-6, 0.05, 3)
        assert config.pairs.safety_share == 0.3
        assert config.judge.name == "llama-guard-3-8b"
        assert config.attack.max_new_tokens >= 128
