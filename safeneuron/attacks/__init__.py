"""Attacks on a model: pruning, jailbreaks, the refusal direction, fine-tuning, attacked checkpoints.

Which attacks a state gets, and verdicts on the answers, are in ``runs`` and ``evaluation``.
"""

from safeneuron._lazy import face

MODULES = {
    "checkpoint": ("write_pruned",),
    "finetuning": ("Demonstration", "finetuned", "read_demonstrations"),
    "jailbreaks": ("Attempt", "input_attempts"),
    "pruning": ("Attack", "PLAIN", "attack", "perplexity", "respond"),
    "refusal_direction": ("Direction", "decoder_layers", "find_direction", "last_of_stream", "without_direction"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
