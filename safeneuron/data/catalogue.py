"""Data sets and benchmarks by name: where each lies on the Hub, under what licence, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safeneuron.data.rows import Source
from safeneuron.errors import InputError, did_you_mean


@dataclass(frozen=True)
class DataSet:
    """A data set of preference pairs on the Hub; what its rows look like is known by their columns, in ``forms``."""

    path: str
    split: str
    licence: str
    kept: str


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
        "hub:sqrti/SPA-VL",
        "train",
        "CC BY 4.0",
        "the chosen over the rejected answer to a question about an image; for vision-language models",
    ),
}
"""The data sets that a config can name, by that name."""

DATA_SET_NAMES = ", ".join(DATA_SETS)
"""For help texts and messages."""


@dataclass(frozen=True)
class PromptSet:
    """A benchmark of requests on the Hub: the column that holds them, and the rows that are meant (see ``Source``)."""

    path: str
    split: str
    column: str
    licence: str
    holds: str
    where: str = ""


PROMPT_SETS = {
    "strongreject": PromptSet(
        "hub:walledai/StrongREJECT", "train", "prompt", "MIT, gated", "313 harmful requests in six categories"
    ),
    "harmbench": PromptSet(
        "hub:walledai/HarmBench/standard", "train", "prompt", "MIT, gated", "200 harmful requests that need no context"
    ),
    "advbench": PromptSet("hub:walledai/AdvBench", "train", "prompt", "MIT, gated", "520 harmful requests"),
    "jailbreakbench:harmful": PromptSet(
        "hub:JailbreakBench/JBB-Behaviors/behaviors", "harmful", "Goal", "MIT", "100 harmful requests in ten categories"
    ),
    "jailbreakbench:benign": PromptSet(
        "hub:JailbreakBench/JBB-Behaviors/behaviors", "benign", "Goal", "MIT", "100 benign requests on the same topics"
    ),
    "xstest:unsafe": PromptSet(
        "hub:Paul/XSTest", "train", "prompt", "CC BY 4.0", "200 harmful contrasts to the safe ones", "label = unsafe"
    ),
    "xstest:safe": PromptSet(
        "hub:Paul/XSTest", "train", "prompt", "CC BY 4.0", "250 benign requests with alarming words", "label = safe"
    ),
    "or-bench:toxic": PromptSet(
        "hub:bench-llm/or-bench/or-bench-toxic", "train", "prompt", "CC BY 4.0", "655 harmful requests"
    ),
    "or-bench:hard": PromptSet(
        "hub:bench-llm/or-bench/or-bench-hard-1k",
        "train",
        "prompt",
        "CC BY 4.0",
        "1,319 benign requests that strong models refuse",
    ),
    "sorry-bench": PromptSet(
        "hub:sorry-bench/sorry-bench-202503",
        "train",
        "turns",
        "its own, gated",
        "440 harmful requests in 44 categories, without the rewritten ones",
        "prompt_style = base",
    ),
}
"""The benchmarks that a source of prompts can name, by that name."""

PROMPT_NAMES = ", ".join(PROMPT_SETS)
"""For help texts and messages."""


def prompts_by_name(source: Source) -> Source:
    """The source with a benchmark's name replaced by its place on the Hub, its split, column and rows.

    Args:
        source: Any source; what it says itself wins over the catalogue.

    Returns:
        The completed source; one that is not a benchmark's name as it was.

    Raises:
        InputError: For what is neither a file, a place on the Hub, bundled, nor a known name.
    """
    path = source.path.casefold()
    known = PROMPT_SETS.get(path)
    if known is not None:
        return replace(
            source,
            path=known.path,
            split=source.split or known.split,
            column=source.column or known.column,
            where=source.where or known.where,
        )
    if path.startswith(("hub:", "twins:")) or Path(path).suffix or Path(source.path).expanduser().exists():
        return source
    raise InputError(
        f"'{source.path}' is neither a file nor a benchmark known by name{did_you_mean(path, PROMPT_SETS)}; known are "
        f"{PROMPT_NAMES}, any other is hub:owner/name, twins:unsafe, twins:safe or a .jsonl or .csv file"
    )


def by_name(source: Source) -> Source:
    """The source with a data set's name replaced by its place on the Hub and its split; any other stays as it is.

    Args:
        source: Any source of pairs; what it says itself wins over the catalogue.

    Returns:
        The completed source.

    Raises:
        InputError: For what is neither a file, a place on the Hub nor a known name.
    """
    path = source.path
    known = DATA_SETS.get(path.casefold())
    if known is not None:
        return replace(source, path=known.path, split=source.split or known.split)
    if ":" not in path and not Path(path).suffix and not Path(path).expanduser().exists():
        raise InputError(
            f"'{path}' is neither a file nor a data set known by name{did_you_mean(path.casefold(), DATA_SETS)}; "
            f"known are {DATA_SET_NAMES}, any other is hub:owner/name or a .jsonl or .csv file"
        )
    return source
