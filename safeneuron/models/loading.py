"""Loading a model from a folder, the Hub or the embedded package, with clear errors for what cannot be used."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from safeneuron.errors import InputError
from safeneuron.models import embedded, vision
from safeneuron.models.model import Model
from safeneuron.neurons.anatomy import decoder_of
from safeneuron.neurons.layout import LINEAGE, fingerprint, widths_of
from safeneuron.neurons.verification import settle_layout
from safeneuron.runtime import distributed, quantization
from safeneuron.runtime.devices import device_named, dtype_named
from safeneuron.runtime.offloading import DeviceMap, materialised, placed


def load(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    quantise: str = "none",
    device_map: DeviceMap = "",
    max_memory: Mapping[str, int | str] | None = None,
    offload_folder: str | Path = "",
) -> Model:
    """Load a chat model from the Hub, from a folder or GGUF file (dequantised), or the embedded one (``"embedded"``).

    A vision-language model comes with its processor; where that cannot be loaded, it can be asked in text all the same.
    What compressed-tensors has packed is unpacked, as it is in GGUF files. Where the model's FFNs lie is proved on a
    few tokens (``verification``).

    With a ``device_map`` accelerate spreads the layers over the GPUs, main memory (``cpu``) and ``disk``, and brings
    what does not fit on a GPU there when it is its turn. Weights on disk are read from the checkpoint, but those of
    experts, which are first written to ``offload_folder``. Such a model is for measuring and attacking.

    Args:
        name: ``"embedded"``, a folder in Hugging Face form, a ``.gguf`` file, or a name on the Hub.
        dtype: ``float32``, ``bfloat16``, ``float16``, ``stored`` (as the weights are stored) or ``auto``: bfloat16
            where the device computes in it, else float32.
        device: A torch device, or ``auto``: a GPU if there is one, of several ranks each its own.
        revision: Of a model on the Hub.
        trust_remote_code: Whether code that comes with the model may be run.
        quantise: ``none``, or ``4bit`` to put the decoder's linear layers into 4 bits on their way to the device (NF4,
            by bitsandbytes); its neurons stay those of the model as stored.
        device_map: ``auto``, or a table of modules and devices.
        max_memory: How much of each device may be taken (``{"0": "70GB", "cpu": "100GB"}``).
        offload_folder: Where experts on disk are written.

    Returns:
        The model in evaluation mode, with its tokenizer.

    Raises:
        InputError: When the model cannot be found, has no FFN that safeneuron knows, or its weights are incomplete or
            not finite.
    """
    source = str(embedded.embedded_folder()) if str(name) == embedded.NAME else str(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(source).parent), Path(source).name
    place = device_named(device)
    precision = None if dtype == "stored" else dtype_named(dtype, place)
    if quantise not in ("none", "4bit"):
        raise InputError(f"quantise {quantise!r} is unknown; expected none or 4bit")
    placing = placed(device_map, max_memory or {}, offload_folder)
    if placing and (device != "auto" or quantise != "none"):
        raise InputError("device_map itself says where a model computes; use device = 'auto' and quantise = 'none'")
    model = _fetched(str(name), source, precision, options, placing)
    network: Any = model.network
    if quantise == "4bit":
        setattr(network.config, LINEAGE, fingerprint(network))
        quantization.quantise(network, decoder_of(network), place)
    if not placing:
        network.to(place)
    settle_layout(network)
    if vision.takes_images(network.config):
        _add_processor(model, options)
    return model


def _fetched(
    name: str, source: str, precision: torch.dtype | None, options: dict[str, Any], placing: dict[str, Any]
) -> Model:
    """The model as transformers makes it, its weights complete and finite; not proved yet, and without a processor."""
    try:
        config = AutoConfig.from_pretrained(source, **options)
        compressed = quantization.compressed_by(config)
        stored = config.dtype or torch.float32
        kind = AutoModelForImageTextToText if vision.takes_images(config) else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Sizes that do not fit are reported below, with the missing weights; the library would only log their names.
        report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with distributed.whole_weights():
            loaded: Any = kind.from_pretrained(
                source,
                config=config,
                dtype=precision or stored,
                use_safetensors=True,
                **report,
                **options,
                **placing,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if "automatic conversion of the weights" in reason:
            reason = "transformers cannot unpack its weights, such as experts of a form that it does not know"
        raise InputError(
            f"the model {name!r} cannot be loaded ({reason}); expected 'embedded', a folder in Hugging Face form "
            "with safetensors, or a name on the Hub that this machine can reach"
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {name!r} has no padding and no end token; set its eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network, loading = loaded
    if "gguf_file" in options:
        quantization.forget(network)
    unpacked = f"{compressed} by compressed-tensors" if compressed else ""
    if compressed and quantization.decompress(network, precision or stored):
        unpacked += ", with its activations rounded, which they are not here"
    widths_of(network)
    _check_weights(network, name, [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    network.eval()
    label = embedded.LABEL if name == embedded.NAME else name
    return Model(network, tokenizer, label, source, stored, unpacked=unpacked)


def _add_processor(model: Model, options: dict[str, Any]) -> None:
    """Load the model's processor, which shares its tokenizer, or keep the reason why there is none."""
    try:
        processor: Any = vision.processor_of(model.source, options)
    except InputError as error:
        model.without_images = str(error)
        return
    processor.tokenizer = model.tokenizer
    model.processor = processor


def quiet() -> None:
    """Keep the libraries' own progress bars and remarks off the terminal; errors still come through.

    For the whole process, so it is the choice of a program, such as the command line, and nothing here calls it.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for library in ("datasets", "trl", "accelerate", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|torch)\..*")


def _check_weights(network: PreTrainedModel, name: str, missing: list[str]) -> None:
    if missing:
        raise InputError(
            f"the model {name!r} lacks {len(missing)} of its weights, or has them in another size (first: "
            f"{min(missing)}), so that they would be random; use another checkpoint"
        )
    for module_name, module in network.named_modules():
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        with materialised(module) if keys else nullcontext():
            for key in keys:
                weight = module.get_parameter(key)
                # torch does not know whether 8-bit floats are finite.
                values = weight.float() if weight.is_floating_point() and weight.element_size() == 1 else weight
                if not torch.isfinite(values).all():
                    raise InputError(
                        f"the model {name!r} holds values that are not finite in {module_name}.{key}; the file is "
                        "damaged or the training diverged, use another checkpoint"
                    )
