"""SafeNeuron: find the neurons that a model's refusals hang on, train safety into the rest, and prove the result.

These names are the public API; others are handed on by the packages: ``from safeneuron.selection import probe``. They
are imported when first used, so that ``import safeneuron`` is instant. For type checkers the same names stand in
``__init__.pyi``, which ``docs/make_stub.py`` writes.
"""

from safeneuron._lazy import face
from safeneuron._version import __version__ as __version__

MODULES = {
    "attacks.checkpoint": ("write_pruned",),
    "attacks.jailbreaks": ("Attempt", "input_attempts"),
    "attacks.pruning": ("Attack", "attack", "perplexity", "respond"),
    "config.schema": ("Config",),
    "config.toml": ("read_config",),
    "data.pairs": ("mix", "read_pairs"),
    "data.prompts": ("read_prompts",),
    "data.rows": ("Source",),
    "data.types": ("Pair", "Prompt"),
    "errors": ("InputError",),
    "evaluation.capability": ("benchmark",),
    "evaluation.judge": ("Judge", "RefusalPhrases"),
    "evaluation.judging": ("make_judge",),
    "models.forward": ("MeasurementSettings",),
    "models.loading": ("load",),
    "models.model": ("Model", "Sampling", "generate"),
    "neurons.interventions": ("Edit", "pruned", "recorded"),
    "neurons.neuron_set": ("NeuronSet",),
    "neurons.statistics": ("ActivationStats",),
    "neurons.weights": ("owned_slices",),
    "reporting.report": ("render_report",),
    "runs.run": ("Run",),
    "selection.measurement": ("measure",),
    "selection.ranking": ("Ranking", "compare"),
    "selection.scores": ("Scores", "score", "select"),
    "training.ablation": ("Ablation", "Refresh"),
    "training.alignment": ("Alignment", "align"),
    "training.freezing": ("FreezeNeurons", "frozen"),
    "training.lora": ("merge_adapters",),
    "training.on_policy": ("on_policy_pairs",),
    "training.settings": ("TrainingSettings",),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
