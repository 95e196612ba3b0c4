"""Every mistake in a config is a sentence that names it; variants are the main training with changes."""

import pytest

from safeneuron.config.align import AlignTable
from safeneuron.config.toml import parse_config
from tests.helpers.configs import refusal

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
    message = refusal(text)
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
    message = refusal(text)
    assert f"unknown key {named}" in message
    assert f"did you mean '{near}'?" in message


def test_an_unknown_key_like_no_other_gets_the_list_of_known_ones():
    message = refusal("[judge]\nzzzzz = 1")
    assert "did you mean" not in message
    assert "known here: name" in message


# -- variants ---------------------------------------------------------------------------------------------------------


def test_a_variant_is_the_main_training_with_its_own_changes_and_label():
    config = parse_config('[align]\nlabel = "main"\nbeta = 0.3\nrounds = 2\n[variants.dpo]\nfreeze = "none"\n', "x")
    assert config.variant("") == config.align
    assert config.variant("dpo") == AlignTable(beta=0.3, rounds=2, freeze="none")
