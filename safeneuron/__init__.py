"""SafeNeuron: find the neurons that a model's refusals hang on, train safety into the rest, and prove the result.

The names below are the public API. They are imported when first used, so that ``import safeneuron`` is instant.
"""

from safeneuron._lazy import face
from safeneuron._version import __version__ as __version__

MODULES = {
    "attacks.checkpoint": ("write_pruned",),
    "attacks.finetuning": (
        "Demonstration",
        "finetuned",
        "read_demonstrations",
    ),
    "attacks.jailbreaks": (
        "Attempt",
        "input_attempts",
    ),
    "attacks.pruning": (
        "Attack",
        "attack",
        "each_layer",
        "each_neuron",
        "perplexity",
        "respond",
        "sweep",
    ),
    "attacks.refusal_direction": (
        "Direction",
        "find_direction",
        "without_direction",
    ),
    "config.schema": ("Config",),
    "config.toml": ("read_config",),
    "data.pairs": (
        "mix",
        "read_pairs",
    ),
    "data.prompts": ("read_prompts",),
    "data.rows": ("Source",),
    "data.types": (
        "Pair",
        "Prompt",
    ),
    "data.typography": (
        "draw",
        "drawn_prompts",
    ),
    "errors": ("InputError",),
    "evaluation.capability": ("benchmark",),
    "evaluation.guard_models": ("LlamaGuard3",),
    "evaluation.judge": (
        "Judge",
        "RefusalPhrases",
    ),
    "evaluation.judging": (
        "Panel",
        "make_judge",
    ),
    "models.exchanges": ("exchanges_of",),
    "models.forward": ("MeasurementSettings",),
    "models.loading": ("load",),
    "models.model": (
        "Model",
        "Sampling",
        "generate",
    ),
    "models.vision_tower": (
        "measure_towers",
        "towers_of",
        "towers_pruned",
    ),
    "models.vllm": ("served",),
    "neurons.interventions": (
        "Edit",
        "pruned",
        "recorded",
    ),
    "neurons.neuron_set": ("NeuronSet",),
    "neurons.statistics": ("ActivationStats",),
    "neurons.weights": ("owned_slices",),
    "reporting.report": ("render",),
    "runs.redteam": (
        "RedTeam",
        "red_team",
    ),
    "runs.run": ("Run",),
    "selection.contrast": (
        "activation_contrast",
        "gradient_gap",
        "twin_difference",
        "twins",
    ),
    "selection.linear_probe": ("probe",),
    "selection.measurement": ("measure",),
    "selection.ranking": (
        "Ranking",
        "compare",
    ),
    "selection.saliency": (
        "snip",
        "wanda",
    ),
    "selection.scores": (
        "Scores",
        "choose",
        "score",
        "select",
    ),
    "training.ablation": ("Ablation",),
    "training.alignment": (
        "Alignment",
        "align",
    ),
    "training.freezing": (
        "FreezeNeurons",
        "frozen",
    ),
    "training.lora": ("merge_adapters",),
    "training.on_policy": ("on_policy_pairs",),
    "training.settings": ("TrainingSettings",),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
