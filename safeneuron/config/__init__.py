"""Every setting, its TOML, the bundled presets, and the states that a config leads to.

What the settings do stands where they are used.
"""

from safeneuron._lazy import face

MODULES = {
    "align": ("AlignTable",),
    "attack": ("JUDGES", "RULES", "AttackTable", "JudgeTable", "Rule"),
    "attack_plan": ("CHANGES", "AttackPlan", "PlannedAttack", "kinds_answered", "stands_for"),
    "schema": ("Config", "sentence_of"),
    "states": ("BASE", "State", "previous", "selectors_for", "states_of"),
    "tables": ("CapabilityTable", "DataTable", "ModelTable", "PairSourceTable", "PairsTable", "SourceTable"),
    "toml": ("presets", "read_config", "to_toml"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
