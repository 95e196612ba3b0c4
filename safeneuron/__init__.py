"""SafeNeuron: find the neurons that a model's refusals hang on, train safety into the rest, and prove the result.

The names below are the public API. They are imported when first used, so that ``import safeneuron`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safeneuron.ablating import Ablation
    from safeneuron.adapters import merge_adapters
    from safeneuron.aligning import Alignment, align
    from safeneuron.attacking import Attack, attack, perplexity, respond
    from safeneuron.attempts import Attempt, input_attempts
    from safeneuron.capability import benchmark
    from safeneuron.comparing import compare
    from safeneuron.config import Config, read_config
    from safeneuron.contrasting import activation_contrast, gradient_gap, twin_difference, twins
    from safeneuron.data import Pair, Prompt, read_prompts
    from safeneuron.directions import Direction, find_direction, without_direction
    from safeneuron.drawing import draw, drawn
    from safeneuron.edits import Edit
    from safeneuron.errors import InputError
    from safeneuron.ffn import owned_slices, pruned, recorded
    from safeneuron.finetuning import Demonstration, finetuned, read_demonstrations
    from safeneuron.freezing import FreezeNeurons, frozen
    from safeneuron.guards import LlamaGuard3
    from safeneuron.judges import Judge, RefusalPhrases, make_judge
    from safeneuron.measuring import measure
    from safeneuron.models import Model, Sampling, generate, load
    from safeneuron.neurons import NeuronSet
    from safeneuron.pairing import on_policy_pairs
    from safeneuron.pairs import mix, read_pairs
    from safeneuron.panel import Panel
    from safeneuron.persisting import weights_pruned, write_pruned
    from safeneuron.probing import probe
    from safeneuron.rankings import Ranking, fractions, set_difference
    from safeneuron.redteam import RedTeam, red_team
    from safeneuron.reporting import render
    from safeneuron.rows import Source
    from safeneuron.runs import Run
    from safeneuron.saliency import snip, snip_weights, wanda, wanda_weights, weight_difference
    from safeneuron.selecting import Scores, choose, score, select
    from safeneuron.serving import served
    from safeneuron.statistics import ActivationStats
    from safeneuron.streaming import exchanges_of
    from safeneuron.sweeping import each_layer, each_neuron, sweep
    from safeneuron.towers import measure_towers, towers_of, towers_pruned
    from safeneuron.training import Training

_HOMES = {
    "ablating": ("Ablation",),
    "adapters": ("merge_adapters",),
    "aligning": ("Alignment", "align"),
    "attacking": ("Attack", "attack", "perplexity", "respond"),
    "attempts": ("Attempt", "input_attempts"),
    "capability": ("benchmark",),
    "comparing": ("compare",),
    "config": ("Config", "read_config"),
    "contrasting": ("activation_contrast", "gradient_gap", "twin_difference", "twins"),
    "data": ("Pair", "Prompt", "read_prompts"),
    "directions": ("Direction", "find_direction", "without_direction"),
    "drawing": ("draw", "drawn"),
    "edits": ("Edit",),
    "errors": ("InputError",),
    "ffn": ("owned_slices", "pruned", "recorded"),
    "finetuning": ("Demonstration", "finetuned", "read_demonstrations"),
    "freezing": ("FreezeNeurons", "frozen"),
    "guards": ("LlamaGuard3",),
    "judges": ("Judge", "RefusalPhrases", "make_judge"),
    "measuring": ("measure",),
    "models": ("Model", "Sampling", "generate", "load"),
    "neurons": ("NeuronSet",),
    "pairing": ("on_policy_pairs",),
    "pairs": ("mix", "read_pairs"),
    "panel": ("Panel",),
    "persisting": ("weights_pruned", "write_pruned"),
    "probing": ("probe",),
    "rankings": ("Ranking", "fractions", "set_difference"),
    "redteam": ("RedTeam", "red_team"),
    "reporting": ("render",),
    "rows": ("Source",),
    "runs": ("Run",),
    "saliency": ("snip", "snip_weights", "wanda", "wanda_weights", "weight_difference"),
    "selecting": ("Scores", "choose", "score", "select"),
    "serving": ("served",),
    "statistics": ("ActivationStats",),
    "streaming": ("exchanges_of",),
    "sweeping": ("each_layer", "each_neuron", "sweep"),
    "towers": ("measure_towers", "towers_of", "towers_pruned"),
    "training": ("Training",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Ablation",
    "ActivationStats",
    "Alignment",
    "Attack",
    "Attempt",
    "Config",
    "Demonstration",
    "Direction",
    "Edit",
    "FreezeNeurons",
    "InputError",
    "Judge",
    "LlamaGuard3",
    "Model",
    "NeuronSet",
    "Pair",
    "Panel",
    "Prompt",
    "Ranking",
    "RedTeam",
    "RefusalPhrases",
    "Run",
    "Sampling",
    "Scores",
    "Source",
    "Training",
    "activation_contrast",
    "align",
    "attack",
    "benchmark",
    "choose",
    "compare",
    "draw",
    "drawn",
    "each_layer",
    "each_neuron",
    "exchanges_of",
    "find_direction",
    "finetuned",
    "fractions",
    "frozen",
    "generate",
    "gradient_gap",
    "input_attempts",
    "load",
    "make_judge",
    "measure",
    "measure_towers",
    "merge_adapters",
    "mix",
    "on_policy_pairs",
    "owned_slices",
    "perplexity",
    "probe",
    "pruned",
    "read_config",
    "read_demonstrations",
    "read_pairs",
    "read_prompts",
    "recorded",
    "red_team",
    "render",
    "respond",
    "score",
    "select",
    "served",
    "set_difference",
    "snip",
    "snip_weights",
    "sweep",
    "towers_of",
    "towers_pruned",
    "twin_difference",
    "twins",
    "wanda",
    "wanda_weights",
    "weight_difference",
    "weights_pruned",
    "without_direction",
    "write_pruned",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safeneuron' has no attribute {name!r}")
    return getattr(import_module(f"safeneuron.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
