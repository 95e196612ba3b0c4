"""Write docs/architectures.md: what of transformers' architectures works, by trying each on a tiny model.

``make architectures`` walks every class that the installed transformers registers for causal language
models and for image-text-to-text, builds a tiny one from its config, and records, prunes and freezes its neurons. Each
is tried in a process of its own, with a limit of time and memory. Ends with exit code 1 where a class breaks.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.helpers.architectures import Result, check

PAGE = Path(__file__).with_name("architectures.md")
SECONDS, BYTES = 90, 6 * 2**30
# State-space models of mixers alone.
WITHOUT = {"MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM"}
KINDS = {
    "Causal language models": (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    "Image-text-to-text models": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
}
HEAD = """\
# Architectures

This page is written by `make architectures`, which builds a tiny random model of every class that transformers
{version} registers, and asks of each:

1. its FFNs are found, by the shapes of their matrices and their place in the tree, and the probe confirms them
   ([how](method.md#where-the-neurons-are));
2. the activations of all neurons are recorded, `[row, token, neuron]`, and those of pruned ones are zero;
3. two steps of AdamW with weight decay, clipping and frozen neurons leave these bit-identical, and move the rest.

*Works* means all of that, for the text decoder (of image-text-to-text models, on text alone). *Refused* models end with
the sentence in the table and exit code 2. *Cannot be built* are classes whose tiny version could not be made here: a
package that is missing, or sizes that a config does not take; nothing is said about them.
"""


def tried(name: str, model_class: Any) -> Result:
    """The result of one class, from a process of its own."""
    near, far = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_try, args=(far, name, model_class))
    process.start()
    far.close()
    told: Any = None
    if near.poll(SECONDS):
        try:
            told = near.recv()
        except EOFError:
            told = f"ended with exit code {process.exitcode}"
    if process.is_alive():
        process.kill()
    process.join()
    if isinstance(told, Result):
        lacks = told.outcome == "refused" and told.architecture in WITHOUT
        return told._replace(outcome="has no FFN") if lacks else told
    return Result(name, model_class.__name__, "breaks", str(told or f"took more than {SECONDS} s"))


def _try(far: Connection, name: str, model_class: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    try:
        told: Any = check(name, model_class)
    except Exception as error:  # a class that breaks is what is looked for
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    far.send(told)
    far.close()


def walk(title: str) -> list[Result]:
    """Every class of one kind, each once."""
    names, mapping = KINDS[title]
    found: dict[str, Result] = {}
    for name in names:
        own: Any = mapping[CONFIG_MAPPING[name]]
        for one in own if isinstance(own, list | tuple) else [own]:
            if one.__name__ not in found:
                found[one.__name__] = tried(name, one)
                sys.stderr.write(f"{found[one.__name__].outcome:16} {one.__name__}\n")
    return [found[name] for name in sorted(found)]


def section(title: str, results: list[Result]) -> str:
    """The table of one kind, with its counts."""
    count = Counter(result.outcome for result in results)
    built = len(results) - count["cannot be built"] - count["has no FFN"]
    lines = [
        f"## {title}\n",
        f"{len(results)} classes, of which {built} can be built tiny and have FFNs: **{count['works']} work "
        f"({count['works'] / built:.1%})**, {count['refused']} are refused, {count['breaks']} break. "
        f"{count['has no FFN']} are refused as they have none.\n",
        "| class | outcome | anatomy of the tiny model, or reason |",
        "|---|---|---|",
    ]
    order = {"breaks": 0, "refused": 1, "has no FFN": 1, "works": 2, "cannot be built": 3}
    for result in sorted(results, key=lambda result: (order[result.outcome], result.architecture)):
        told = result.told.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{result.architecture}` | {result.outcome} | {told[:320]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; the exit code is 1 where a class breaks."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {title: walk(title) for title in KINDS}
    parts = [
        HEAD.format(version=transformers.__version__),
        *(section(title, found) for title, found in results.items()),
    ]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    return int(any(result.outcome == "breaks" for found in results.values() for result in found))


if __name__ == "__main__":
    sys.exit(main())
