"""Models: loading, chat templates, generation, forward passes, images, vLLM.

What is measured on a model is in ``selection``, what is trained into it in ``training``.
"""

from safeneuron._lazy import face

MODULES = {
    "doctor": ("examine",),
    "embedded": ("ENCODER_MODULE", "NAME", "embedded_folder", "encoder_folder"),
    "exchanges": (
        "Batch", "Exchange", "common_ending", "exchanges_of", "log_probabilities", "run_backward", "run_decoder",
        "total_over_batches",
    ),
    "forward": (
        "MeasurementSettings", "POOLINGS", "forward_batches", "over_ranks", "pooled_batches", "prompts_in_halves",
    ),
    "loading": ("load", "quiet"),
    "model": (
        "Model", "Sampling", "encode_chat", "generate", "generate_texts", "generation_settings", "pad", "padding_token",
    ),
    "shape": ("Shape",),
    "vision": (
        "ImageTokens", "answer_ids", "encode_image_chat", "image_features", "input_kinds", "joined_images", "pixels_at",
        "processor_of", "run_without_head", "takes_images", "vision_parameters",
    ),
    "vision_tower": ("measure_towers", "pruned_anywhere", "towers_of", "towers_pruned"),
    "vllm": ("Server", "served"),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
