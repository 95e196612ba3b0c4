"""Which neurons: activation statistics of a model, scores, the safety set, and rival selectors.

What becomes of the neurons, pruned or frozen, is in ``attacks`` and ``training``.
"""

from safeneuron._lazy import face

MODULES = {
    "contrast": ("activation_contrast", "gradient_gap", "twin_difference", "twins"),
    "linear_probe": ("held_out_accuracy", "probe"),
    "measurement": ("activations_of", "measure", "measure_groups", "search"),
    "ranking": ("Ranking", "compare", "expected_jaccard", "one_model", "rank_correlation"),
    "saliency": ("snip", "wanda"),
    "scores": (
        "FEWEST",
        "Scores",
        "SelectionSettings",
        "choose",
        "criteria",
        "effect_size",
        "resolve_thresholds",
        "score",
        "select",
        "thresholds_for",
    ),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
