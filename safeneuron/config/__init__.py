"""Every setting, its TOML, the bundled presets, and the states that a config leads to.

What the settings do stands where they are used.
"""

from safeneuron._lazy import face

MODULES = {
    "schema": (
        "AlignTable",
        "AttackTable",
        "CapabilityTable",
        "Config",
        "DataTable",
        "JudgeTable",
        "ModelTable",
        "PairSourceTable",
        "SourceTable",
    ),
    "states": ("BASE", "State", "previous", "selectors_for", "states_of"),
    "toml": ("presets", "read_config", "to_toml"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
