"""What an answer is worth: judges, rates with their intervals and tests, capability benchmarks.

Where answers come from is the business of ``attacks`` and ``runs``.
"""

from safeneuron._lazy import face

MODULES = {
    "capability": ("TASKS", "benchmark", "require_benchmarks"),
    "coherence": ("incoherent",),
    "embeddings": ("Likeness", "first_of_each", "likeness", "mean_distance", "nearest_reference", "self_bleu"),
    "guard_models": ("LlamaGuard3",),
    "judge": ("Judge", "RefusalPhrases", "sounds_like_refusal"),
    "judging": ("Panel", "agreement", "judged", "make_judge", "read_answers", "verdict_lines"),
    "rates": (
        "Rate", "bootstrap_interval", "corrected", "paired_difference", "percentile_interval", "resamples", "share_of",
        "verdict_rates", "wilson",
    ),
    "rubric": ("Endpoint",),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
