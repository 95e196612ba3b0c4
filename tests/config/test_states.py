"""The states that a config leads to, and what each is trained from."""

from safeneuron.config.states import BASE, State, previous, selectors_for, states_of
from safeneuron.config.toml import parse_config, read_config

TEXT = """
[align]
rounds = 2
[attack]
selectors = ["probe", "contrast"]
[variants.dpo]
freeze = "none"
rounds = 1
"""


def test_every_state_comes_after_the_one_it_is_trained_from():
    states = states_of(parse_config(TEXT, "x"))
    assert [state.name for state in states] == ["T0", "T1", "T2", "dpo-T1"]
    assert [previous(state).name for state in states[1:]] == ["T0", "T1", "T0"]
    assert states_of(read_config("audit")) == [BASE]


def test_nothing_contrasts_with_the_given_model_itself():
    config = parse_config(TEXT, "x")
    assert selectors_for(config.attack, BASE) == ["probe"]
    assert selectors_for(config.attack, State("dpo", 1)) == ["probe", "contrast"]
