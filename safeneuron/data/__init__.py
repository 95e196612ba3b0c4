"""Prompts, preference pairs and images: read from files and the Hub, checked, and named.

The bundled texts lie in ``bundled/``; where a run keeps what it read is the business of ``runs``.
"""

from safeneuron._lazy import face

MODULES = {
    "catalogue": ("DATA_SET_NAMES", "PROMPT_NAMES", "by_name", "prompts_by_name"),
    "images": ("digest_of", "name_of", "opened"),
    "pairs": ("left_out", "mix", "read_pairs"),
    "prompts": ("benign_text", "check_classes", "check_splits", "fitting_refusal", "read_prompts", "read_twins"),
    "rows": ("Message", "Row", "Source", "as_source", "read_rows", "text_at", "value_at"),
    "types": ("Pair", "Prompt"),
    "typography": ("draw", "drawn_prompts"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
