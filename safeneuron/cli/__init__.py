"""The command line: verbs, bars, errors as one sentence; the only package that prints.

A verb reads its arguments and calls the package that does the work.
"""

from safeneuron._lazy import face

MODULES = {
    "app": ("main",),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
