"""Models: loading, chat templates, generation, forward passes, images, vLLM.

What is measured on a model is in ``selection``, what is trained into it in ``training``.
"""

from safeneuron._lazy import face

MODULES = {
    "doctor": ("examine",),
    "embedded": ("ENCODER_MODULE", "NAME", "embedded_folder", "encoder_folder"),
    "forward": (
        "Batch",
        "Exchange",
        "common_ending",
        "exchanges_of",
        "length_batches",
        "log_probabilities",
        "over_ranks",
        "pooled",
        "prompts_alone",
        "run_backward",
        "run_decoder",
        "total_gradient_work",
    ),
    "loading": ("load", "quiet"),
    "model": ("Message", "Model", "Sampling", "encode_chat", "generate"),
    "shape": ("Shape",),
    "vision": (
        "ImageTokens",
        "answer_ids",
        "encode_image_chat",
        "image_features",
        "input_kinds",
        "joined_images",
        "pixels_at",
        "processor_of",
        "run_without_head",
        "takes_images",
        "vision_parameters",
    ),
    "vision_tower": ("measure_towers", "pruned_anywhere", "towers_of", "towers_pruned"),
    "vllm": ("Server", "served"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
