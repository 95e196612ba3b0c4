"""Every setting can be written, read and explained; every mistake in one is a sentence that names it."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from safeneuron.config import schema
from safeneuron.config.schema import AlignTable, Config, JudgeName
from safeneuron.config.toml import parse_config, presets, read_config, to_toml
from safeneuron.errors import InputError
from safeneuron.evaluation.judging import JUDGES


def message_of(text: str, *changes: str) -> str:
    """The sentence that a config is refused with; it is one line and names where the config came from."""
    with pytest.raises(InputError) as error:
        parse_config(text, "my.toml", changes)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


# -- what comes with the package --------------------------------------------------------------------------------------


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
    tables = [
        kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.SettingsTable)
    ]
    assert len(tables) > 10
    for table in tables:
        for name, field in table.model_fields.items():
            assert field.description, f"{table.__name__}.{name}"
            if not table.__name__.endswith("SourceTable"):
                assert f"# {field.description}\n" in text + "\n"
    bare = [line for line in to_toml(Config(), comments=False).splitlines() if line.startswith("#")]
    assert all(line.endswith(" =") for line in bare), "without comments only keys without a value are commented out"


def test_the_paper_presets_hold_the_papers_numbers():
    for name, effect in (("paper-qwen", 3.0), ("paper-llama", 2.0)):
        config = read_config(name)
        assert (config.select.effect_size, config.select.shift) == (effect, 2.0)
        align = config.align
        assert (align.beta, align.learning_rate, align.weight_decay, align.epochs) == (0.1, 5e-6, 0.05, 3)
        assert config.pairs.safety_share == 0.3
        assert config.judge.name == "llama-guard-3-8b"
        assert config.attack.max_new_tokens >= 128


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
    assert set(get_args(JudgeName)) == set(JUDGES), "the config knows every judge"


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


# -- reading ----------------------------------------------------------------------------------------------------------


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
    assert "line 3" in message_of('name = "x"\n[align]\nrounds = = 2\n')
    assert "line 2" in message_of("seed = 1\nseed = 2\n")


# -- values that cannot be used ---------------------------------------------------------------------------------------

BAD = [
    ("seed = -1", "seed = -1", "greater than or equal to 0"),
    ('seed = "x"', "seed = 'x'", "integer"),
    ('name = ""', "name = ''", "pattern"),
    ('name = "../x"', "name = '../x'", "pattern"),
    ('name = ".."', "name = '..'", "pattern"),
    ("align = 3", "align = 3", "table"),
    ("[model]\ndtype = 'int8'", "model.dtype = 'int8'", "'float32'"),
    ("[measure]\npooling = 'first'", "measure.pooling = 'first'", "'last', 'mean' or 'max'"),
    ("[measure]\nbatch_tokens = 0", "measure.batch_tokens = 0", "greater than or equal to 1"),
    ("[select]\ndensity = 1.0", "select.density = 1.0", "less than 1"),
    ("[select]\neffect_size = nan\nshift = 2", "select.effect_size = nan", "finite"),
    ("[select]\neffect_size = 2", "select: give both effect_size and shift", "density alone"),
    ("[select]\neffect_size = 2\nshift = 2\ndensity = 0.1", "select: give both", "density alone"),
    ("[pairs]\nsafety = 'on-polcy'", "pairs.safety = 'on-polcy'", "'on-policy'"),
    ("[pairs]\nsafety = [{ path = 'x', count = 0 }]", "pairs.safety.0.count = 0", "greater than or equal to 1"),
    ("[pairs]\nsafety = [{ count = 3 }]", "lacks the key 'pairs.safety.0.path'", "value"),
    ("[pairs]\nsafety_share = 0", "pairs.safety_share = 0", "greater than 0"),
    ("[pairs]\nsafety_share = 1.5", "pairs.safety_share = 1.5", "less than or equal to 1"),
    ("[align]\nrounds = -1", "align.rounds = -1", "greater than or equal to 0"),
    ("[align]\nrounds = 1.5", "align.rounds = 1.5", "integer"),
    ("[align]\nfreeze = 'all'", "align.freeze = 'all'", "'safety', 'random', 'none' or 'all-but-safety'"),
    ("[align]\nablate = 'maybe'", "align.ablate = 'maybe'", "boolean"),
    ("[align]\nablate_share = 0", "align.ablate_share = 0", "greater than 0"),
    ("[align]\nbeta = 0", "align.beta = 0", "greater than 0"),
    ("[align]\nlearning_rate = -1e-5", "align.learning_rate = -1e-05", "greater than 0"),
    ("[align]\nlearning_rate = nan", "align.learning_rate = nan", "finite"),
    ("[align]\nlearning_rate = inf", "align.learning_rate = inf", "finite"),
    ("[align]\nwarmup_share = 2", "align.warmup_share = 2", "less than or equal to 1"),
    ("[align]\nbatch_size = 6", "align: batch_size 6 is not a multiple of micro_batch_size 4", ""),
    ("[attack]\nmax_new_tokens = 0", "attack.max_new_tokens = 0", "greater than or equal to 1"),
    ("[attack]\nsets = ['ES', 'es']", "attack.sets.1 = 'es'", "'ES', 'SAS' or 'FULL'"),
    ("[attack]\nknowledge = 'static'", "attack.knowledge = 'static'", "use a list"),
    ("[attack]\ncurve = [0.1, 1.0]", "attack.curve.1 = 1.0", "less than 1"),
    ("[judge]\nname = 'me'", "judge.name = 'me'", "'refusal-phrases'"),
    ("[judge]\nname = ['refusal-phrases', 'me']", "judge.name.1 = 'me'", "'refusal-phrases'"),
    ("[judge]\nname = []", "name must hold different judges, found none", ""),
    ("[judge]\nname = ['wildguard', 'wildguard']", "name must hold different judges, found wildguard, wildguard", ""),
    ("[judge]\nname = 'rubric'", "the judge rubric needs url and model", ""),
    ("[judge]\nrule = 'most'", "judge.rule = 'most'", "'majority', 'all' or 'any'"),
    ("[report]\nexamples = -1", "report.examples = -1", "greater than or equal to 0"),
    ("[variants.dpo]\nbeta = 0", "[variants.dpo]: beta = 0", "greater than 0"),
    ("[variants.dpo]\nbatch_size = 6", "[variants.dpo]: batch_size 6 is not a multiple", ""),
    ("[variants.Dpo]\nbeta = 1", "variants.Dpo = 'Dpo'", "pattern"),
    ("[variants]\ndpo = 3", "variants.dpo = 3", "table"),
]


@pytest.mark.parametrize(("text", "named", "said"), BAD)
def test_a_bad_value_is_named_with_what_was_expected(text, named, said):
    message = message_of(text)
    assert message.startswith("my.toml")
    assert named in message
    assert said in message


UNKNOWN = [
    ("nmae = 'x'", "'nmae'", "name"),
    ("[algin]\nrounds = 2", "'algin'", "align"),
    ("[align]\nlearning_rte = 1", "'align.learning_rte'", "learning_rate"),
    ("[data]\nunsafe = [{ path = 'x', colum = 'y' }]", "'data.unsafe.0.colum'", "column"),
    ("[pairs]\nsafety = [{ path = 'x', spilt = 'y' }]", "'pairs.safety.0.spilt'", "split"),
    ("[variants.dpo]\nfreze = 'none'", "'freze'", "freeze"),
]


@pytest.mark.parametrize(("text", "named", "near"), UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text, named, near):
    message = message_of(text)
    assert f"unknown key {named}" in message
    assert f"did you mean '{near}'?" in message


def test_an_unknown_key_like_no_other_gets_the_list_of_known_ones():
    message = message_of("[judge]\nzzzzz = 1")
    assert "did you mean" not in message
    assert "known here: name" in message


# -- changes from the command line ------------------------------------------------------------------------------------


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
    assert said in message_of("seed = 1", change)


# -- variants ---------------------------------------------------------------------------------------------------------


def test_a_variant_is_the_main_training_with_its_own_changes_and_label():
    config = parse_config('[align]\nlabel = "main"\nbeta = 0.3\nrounds = 2\n[variants.dpo]\nfreeze = "none"\n', "x")
    assert config.variant("") == config.align
    assert config.variant("dpo") == AlignTable(beta=0.3, rounds=2, freeze="none")
