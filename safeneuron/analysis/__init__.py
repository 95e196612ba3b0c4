"""A look inside the states of a finished run: topics, depth, stability, drift, redundancy, and more.

One module a part, each with its numbers; the figures of all are in ``figures``.
"""

from safeneuron._lazy import face

MODULES = {
    "analyser": ("ANALYSIS_PARTS", "Analyser"),
    "settings": ("Effort",),
    "tables": ("analysis_tables",),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
