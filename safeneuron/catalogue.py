"""Preference data by name: where each data set lies on the Hub, under what licence, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safeneuron.errors import InputError, nearest
from safeneuron.rows import Source


@dataclass(frozen=True)
class DataSet:
    """A data set of preference pairs on the Hub; what its rows look like is known by their columns, in ``forms``."""

    path: str
    split: str
    licence: str
    kept: str
    images: bool = False


DATA_SETS = {
    "pku-saferlhf": DataSet(
        "hub:PKU-Alignment/PKU-SafeRLHF",
        "train",
        "CC BY-NC 4.0",
        "the safer response over the other, where it is safe and the other is not",
    ),
    "beavertails": DataSet(
        "hub:PKU-Alignment/BeaverTails",
        "30k_train",
        "CC BY-NC 4.0",
        "a safe response over an unsafe one to the same prompt, each used once",
    ),
    "hh-rlhf": DataSet(
        "hub:Anthropic/hh-rlhf", "train", "MIT", "the chosen over the rejected end of each conversation"
    ),
    "hh-rlhf-harmless": DataSet(
        "hub:Anthropic/hh-rlhf/harmless-base", "train", "MIT", "the same, of the part on harmlessness alone"
    ),
    "ultrafeedback-binarized": DataSet(
        "hub:HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "MIT", "the chosen over the rejected answer"
    ),
    "wildjailbreak": DataSet(
        "hub:allenai/wildjailbreak/train",
        "train",
        "ODC-BY, gated",
        "harmful requests: the refusal over a made opening; benign ones: the answer over a bundled refusal",
    ),
    "spa-vl": DataSet(
        "hub:sqrti/SPA-VL", "train", "CC BY 4.0", "nothing yet: its questions are about images", images=True
    ),
}
"""The data sets that a config can name, by that name."""

NAMES = ", ".join(name for name, known in DATA_SETS.items() if not known.images)
"""Those that can be read, for help texts and messages."""


def by_name(source: Source) -> Source:
    """The source with a data set's name replaced by its place on the Hub and its split; any other stays as it is.

    What the source says itself wins. Raises InputError for what is neither a file, a place on the Hub nor a known name.
    """
    path = source.path
    known = DATA_SETS.get(path.casefold())
    if known is not None:
        return replace(source, path=known.path, split=source.split or known.split)
    if ":" not in path and not Path(path).suffix and not Path(path).expanduser().exists():
        raise InputError(
            f"'{path}' is neither a file nor a data set known by name{nearest(path.casefold(), DATA_SETS)}; known are "
            f"{NAMES}, any other is hub:owner/name or a .jsonl or .csv file"
        )
    return source


def has_images(source: Source) -> bool:
    """Whether the source is a data set that is known to be about images."""
    return any(known.images and source.path.startswith(known.path) for known in DATA_SETS.values())
