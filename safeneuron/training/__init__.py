"""Training with frozen neurons: exact freezing, DPO, LoRA, refresh, on-policy pairs.

Which neurons are frozen is decided in ``selection``.
"""

from safeneuron._lazy import face

MODULES = {
    "ablation": ("Ablation", "Refresh"),
    "alignment": ("Alignment", "align"),
    "freezing": ("FreezeNeurons", "frozen"),
    "lora": ("lora_config", "merge_adapters"),
    "on_policy": ("USABLE", "on_policy_pairs", "refusal", "whole_sentences"),
    "settings": (
        "TrainingSettings", "Watch", "common_arguments",
        "is_sharded", "model_restored", "require_trainable_settings",
    ),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
