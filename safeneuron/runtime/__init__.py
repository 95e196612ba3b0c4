"""What the machine gives: files that are whole or absent, processes, devices and their memory, progress.

Nothing here knows of neurons, prompts or settings.
"""

from safeneuron._lazy import face

MODULES = {
    "devices": (
        "Halving", "available_memory", "bfloat16_pays", "device_named", "dtype_named", "hand_back_memory",
        "out_of_memory", "peak_memory_mb", "reporting_shortage", "reset_peak_memory", "resident_memory", "reuse_memory",
    ),
    "distributed": (),
    "files": (
        "FILE_SCHEMA", "FREE_SPACE", "append_lines", "discard", "disk_full", "kept_lines", "key_of", "one_at_a_time",
        "read_json", "read_lines", "sha256_of", "whole_folder", "write_bytes", "write_json", "write_lines",
        "write_text", "writing",
    ),
    "offloading": (
        "DeviceMap", "device_of_inputs", "explaining_meta_tensors", "is_offloaded", "materialised", "placed",
        "require_whole",
    ),
    "patches": ("answers_scored_alone", "warnings_told", "without_progress_bars"),
    "progress": ("Progress", "Watcher", "progress_of_part", "progress_of_section"),
    "quantization": ("dense", "dequantised", "has_four_bits", "in_four_bits", "is_quantised", "packed_by"),
    "sharding": (),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
