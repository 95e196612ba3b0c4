"""Runs: their folder, stages and pipeline, red teaming, publishing: who knows config and files together.

What a stage computes is in the packages below.
"""

from safeneuron._lazy import face

MODULES = {
    "attackers": ("sample",),
    "compare": ("write_comparison",),
    "context": ("StateModels",),
    "findings": ("Findings",),
    "hub": ("check_repository", "push"),
    "inputs": ("judge_of", "judges_of", "measurement_of", "model_of", "selection_of"),
    "pipeline": ("Pipeline", "prepare"),
    "publication": ("Publication", "publish"),
    "redteam": ("RedTeam", "prepare_redteam", "red_team", "table"),
    "run": ("Run",),
    "runner": ("Runner", "StageSpec"),
    "show": ("explain", "result_grid"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
