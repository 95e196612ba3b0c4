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
    from safeneuron.attacking import Attack, attack, perplexity
    from safeneuron.config import Config, read_config
    from safeneuron.data import Pair, Prompt, read_prompts
    from safeneuron.errors import InputError
    from safeneuron.ffn import owned_slices, pruned, recorded
    from safeneuron.freezing import FreezeNeurons, frozen
    from safeneuron.guards import LlamaGuard3
    from safeneuron.judges import Judge, RefusalPhrases, make_judge
    from safeneuron.measuring import measure
    from safeneuron.models import Model, generate, load
    from safeneuron.neurons import NeuronSet
    from safeneuron.pairing import on_policy_pairs
    from safeneuron.pairs import mix, read_pairs
    from safeneuron.panel import Panel
    from safeneuron.reporting import render
    from safeneuron.runs import Run
    from safeneuron.selecting import Scores, choose, score, select
    from safeneuron.statistics import ActivationStats
    from safeneuron.training import Training

_HOMES = {
    "ablating": ("Ablation",),
    "adapters": ("merge_adapters",),
    "aligning": ("Alignment", "align"),
    "attacking": ("Attack", "attack", "perplexity"),
    "config": ("Config", "read_config"),
    "data": ("Pair", "Prompt", "read_prompts"),
    "errors": ("InputError",),
    "ffn": ("owned_slices", "pruned", "recorded"),
    "freezing": ("FreezeNeurons", "frozen"),
    "guards": ("LlamaGuard3",),
    "judges": ("Judge", "RefusalPhrases", "make_judge"),
    "measuring": ("measure",),
    "models": ("Model", "generate", "load"),
    "neurons": ("NeuronSet",),
    "pairing": ("on_policy_pairs",),
    "pairs": ("mix", "read_pairs"),
    "panel": ("Panel",),
    "reporting": ("render",),
    "runs": ("Run",),
    "selecting": ("Scores", "choose", "score", "select"),
    "statistics": ("ActivationStats",),
    "training": ("Training",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Ablation",
    "ActivationStats",
    "Alignment",
    "Attack",
    "Config",
    "FreezeNeurons",
    "InputError",
    "Judge",
    "LlamaGuard3",
    "Model",
    "NeuronSet",
    "Pair",
    "Panel",
    "Prompt",
    "RefusalPhrases",
    "Run",
    "Scores",
    "Training",
    "align",
    "attack",
    "choose",
    "frozen",
    "generate",
    "load",
    "make_judge",
    "measure",
    "merge_adapters",
    "mix",
    "on_policy_pairs",
    "owned_slices",
    "perplexity",
    "pruned",
    "read_config",
    "read_pairs",
    "read_prompts",
    "recorded",
    "render",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'safeneuron' has no attribute {name!r}")
    return getattr(import_module(f"safeneuron.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
