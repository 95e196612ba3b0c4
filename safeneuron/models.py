"""Loading a chat model, turning prompts into tokens and batches, and generating answers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from safeneuron import embedded, quantising, ranks, vision
from safeneuron.conformance import settle_layout
from safeneuron.data import Prompt
from safeneuron.errors import InputError
from safeneuron.ffn import LINEAGE, decoder_of, fingerprint, widths_of
from safeneuron.halving import Halving
from safeneuron.offloading import DeviceMap, at_hand, device_of_inputs, meta_explained, placed
from safeneuron.pictures import digest_of
from safeneuron.runs import whole_folder

Message = dict[str, str]


@dataclass
class Model:
    """A causal language model with its tokenizer, or a vision-language model with its processor.

    ``name`` is what reports call it, ``source`` where it was loaded from, ``stored_dtype`` the precision of its weights
    there, which may be another than the one it computes in now. Without a ``processor`` the model is asked in text
    only; of a vision-language model, ``blind`` says why it has none. ``unpacked`` says how weights that are plain here
    were packed.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    stored_dtype: torch.dtype = torch.float32
    processor: ProcessorMixin | None = None
    blind: str = ""
    unpacked: str = ""
    _known: dict[tuple[str, str], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Whose neurons these are; the same for all models trained from one (see ``ffn.fingerprint``)."""
        return fingerprint(self.network)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return widths_of(self.network)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return device_of_inputs(self.network) or self.network.device

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, the processor's or the tokenizer's."""
        return bool(self._sees_chats or self.tokenizer.chat_template)

    @property
    def _sees_chats(self) -> bool:
        return self.processor is not None and bool(cast("Any", self.processor).chat_template)

    def encode(self, messages: Sequence[Message], picture: Any = None) -> list[int]:
        """Token ids of a conversation through the chat template, with the generation prompt at the end.

        A picture (see ``Prompt``) stands at the beginning of the first message of the user; the result is then
        ``vision.Tokens``. A model without a chat template gets the bare text of the messages, with its own special
        tokens. Raises ``InputError`` for a picture that the model cannot be shown.
        """
        if self.processor is not None and self._sees_chats:
            if picture is None:
                return vision.encode(self.processor, messages, None)
            # The same pictures are asked about under every attack; how many tokens they take is remembered.
            key = (repr(messages), digest_of(picture))
            if key not in self._known:
                self._known[key] = vision.encode(self.processor, messages, picture)
            return self._known[key]
        if picture is not None:
            reason = self.blind or "it is no vision-language model, or its processor has no chat template"
            raise InputError(f"{self.name} cannot be shown images: {reason}; use prompts without images")
        return encode(self.tokenizer, messages)

    def ask(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """Token ids of one request, with its picture if it has one, cut to its last ``max_tokens``.

        Raises ``InputError`` like ``encode``, and where a picture would be cut.
        """
        ids = self.encode([{"role": "user", "content": prompt.written}], prompt.image)
        return ids if max_tokens is None else vision.cut(ids, max_tokens, prompt.text)

    def inputs(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        """What the network is given of encoded conversations, padded on the given side: ids, mask, pictures.

        Either all rows have a picture or none has.
        """
        ids, mask = pad(rows, int(self.tokenizer.pad_token_id), side, self.device)
        seen = [row for row in rows if isinstance(row, vision.Tokens)]
        assert len(seen) in (0, len(rows)), "rows with and without a picture do not share a batch"
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.processor is None or not seen:
            return inputs
        features = [vision.features_of(self.processor, row) for row in seen]
        together = vision.joined(features, [len(row) for row in seen], ids.shape[1], side)
        return inputs | vision.pixels_at(together, self.network)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder, whole or not at all; its config remembers whose neurons the model has.

        Raises ``InputError`` for a model that is quantised in memory.
        """
        if quantising.has_four_bits(self.network):
            raise InputError(f"{self.name} is in 4 bits here, which cannot be saved; save what it was made from")
        setattr(self.network.config, LINEAGE, self.fingerprint)
        if ranks.is_main():
            with whole_folder(folder) as neighbour:
                self.network.save_pretrained(neighbour)
                (self.processor or self.tokenizer).save_pretrained(neighbour)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn at random: from the most probable tokens that together have ``top_p``, at ``temperature``.

    The draws depend on the ``seed`` and on what shares a batch alone, so interrupted work continues with the same
    ones. Raises ``InputError`` for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "to sample, temperature must be above 0 and top_p above 0 and at most 1, found "
                f"{self.temperature:g} and {self.top_p:g}; leave sampling out to answer greedily"
            )


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation for whatever answers it; see ``Model.encode``."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    quantise: str = "none",
    device_map: DeviceMap = "",
    max_memory: Mapping[str, int | str] | None = None,
    offload_folder: str | Path = "",
) -> Model:
    """Load a chat model from the Hub, from a folder or GGUF file (dequantised), or the embedded one (``"embedded"``).

    A vision-language model comes with its processor; where that cannot be loaded, it can be asked in text all the same.
    ``dtype`` is ``float32``, ``bfloat16``, ``float16``, ``stored`` (as the weights are stored) or ``auto``: bfloat16
    where the device computes in it, else float32. ``device`` is a torch device or ``auto``: a GPU if there is one, of
    several ranks each its own.
    ``quantise`` is ``none``, or ``4bit`` to put the decoder's linear layers into 4 bits on their way to the device
    (NF4, by bitsandbytes); its neurons stay those of the model as stored.
    What compressed-tensors has packed is unpacked, as it is in GGUF files.

    With a ``device_map``, ``auto`` or a table of modules and devices, accelerate spreads the layers over the GPUs, main
    memory (``cpu``) and ``disk``, and brings what does not fit on a GPU there when it is its turn. ``max_memory`` says
    how much of each may be taken (``{"0": "70GB", "cpu": "100GB"}``); weights on disk are read from the checkpoint, but
    those of experts, which are first written to ``offload_folder``. Such a model is for measuring and attacking.

    Where its FFNs lie is proved on a few tokens (``conformance``).

    Raises ``InputError`` when the model cannot be found, has no FFN that safeneuron knows, or its weights are
    incomplete or not finite.
    """
    quiet()
    source = str(embedded.embedded_folder()) if str(name) == embedded.NAME else str(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(source).parent), Path(source).name
    place = _device(device)
    precision = None if dtype == "stored" else _dtype(dtype, place)
    if quantise not in ("none", "4bit"):
        raise InputError(f"quantise {quantise!r} is unknown; expected none or 4bit")
    placing = placed(device_map, max_memory or {}, offload_folder)
    if placing and (device != "auto" or quantise != "none"):
        raise InputError("device_map itself says where a model computes; use device = 'auto' and quantise = 'none'")
    model = _fetched(str(name), source, precision, options, placing)
    network: Any = model.network
    if quantise == "4bit":
        setattr(network.config, LINEAGE, fingerprint(network))
        quantising.quantise(network, decoder_of(network), place)
    if not placing:
        network.to(place)
    settle_layout(network)
    if vision.sees(network.config):
        _give_eyes(model, options)
    return model


def _fetched(
    name: str, source: str, precision: torch.dtype | None, options: dict[str, Any], placing: dict[str, Any]
) -> Model:
    """The model as transformers makes it, its weights complete and finite; not proved yet, and without eyes."""
    try:
        config = AutoConfig.from_pretrained(source, **options)
        compressed = quantising.compressed_by(config)
        stored = config.dtype or torch.float32
        kind = AutoModelForImageTextToText if vision.sees(config) else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # Sizes that do not fit are reported below, with the missing weights; the library would only log their names.
        report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with ranks.whole_weights():
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
        quantising.forget(network)
    unpacked = f"{compressed} by compressed-tensors" if compressed else ""
    if compressed and quantising.decompress(network, precision or stored):
        unpacked += ", with its activations rounded, which they are not here"
    widths_of(network)
    _check_weights(network, name, [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    network.eval()
    label = embedded.LABEL if name == embedded.NAME else name
    return Model(network, tokenizer, label, source, stored, unpacked=unpacked)


def _give_eyes(model: Model, options: dict[str, Any]) -> None:
    """Load the model's processor, which shares its tokenizer, or keep the reason why there is none."""
    try:
        processor: Any = vision.processor_of(model.source, options)
    except InputError as error:
        model.blind = str(error)
        return
    processor.tokenizer = model.tokenizer
    model.processor = processor


def quiet() -> None:
    """Keep the libraries' own progress bars and remarks off the terminal; errors still come through."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for library in ("datasets", "trl", "accelerate", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|torch)\..*")


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself; elsewhere bfloat16 is emulated and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[row, token]`` of rows of unequal length, padded on the given side."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    skip: int = 0,
    opening: int = 0,
    sampling: Sampling | None = None,
    within: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Answers to encoded prompts, greedy or sampled, batch by batch, as (index of the prompt, text).

    All ranks get all answers; each of them generates its share of the batches. The last ``opening`` tokens of every
    prompt are the beginning of its answer, and part of the text.

    Batches are formed by length, always in the same way, and padded on the left; the first ``skip`` prompts in that
    order, always whole batches, are left out, so that interrupted work continues with the same batches. An answer ends
    at any end token of the model's generation settings, or at the tokenizer's own. A batch that does not fit into
    memory is answered in halves, with a ``MemoryShortage`` warning, and so are all later ones. ``within`` makes a block
    around each batch, given the indices of the prompts in its rows.
    """
    batches = by_length(prompts, batch_size, skip)
    drawn = {} if sampling is None else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # A static cache was slower than this dynamic one at every batch size, and compiled graphs would not see hooks.
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=sampling is not None,
        **drawn,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model.network.generation_config, model.tokenizer),
        pad_token_id=model.tokenizer.pad_token_id,
        use_cache=True,
    )
    answer = cast("Callable[..., Tensor]", model.network.generate)

    def texts_of(batch: Sequence[int]) -> list[str]:
        inputs = model.inputs([prompts[i] for i in batch], "left")
        around = nullcontext() if within is None else within(batch)
        seeded = _seeded(sampling, batch[0], model.device)
        with torch.inference_mode(), meta_explained(model.network), seeded, around:
            out = answer(**inputs, generation_config=settings)
        width = inputs["input_ids"].shape[1]
        texts = model.tokenizer.batch_decode(out[:, width - opening :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    halving: Halving[int] = Halving("answering", "use a smaller max_new_tokens, or a device with more memory")

    def in_halves(batch: list[int]) -> list[str]:
        # Prompts with and without a picture may be in one batch, but not in one pass.
        found: dict[int, str] = {}
        for places in vision.kinds([prompts[index] for index in batch]):
            alike = [batch[place] for place in places]
            texts = [text for part in halving.over(alike, texts_of) for text in part]
            found |= dict(zip(alike, texts, strict=True))
        return [found[index] for index in batch]

    for batch, texts in zip(batches, ranks.deal(batches, in_halves), strict=True):
        yield list(zip(batch, texts, strict=True))


@contextmanager
def _seeded(sampling: Sampling | None, first: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws what the seed and the first prompt of a batch decide; then it goes on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed * 1_000_003 + first)
        yield


def by_length(prompts: Sequence[Sequence[int]], batch_size: int, skip: int = 0) -> list[list[int]]:
    """Indices of prompts in batches, longest first, without the first ``skip`` prompts, which are whole batches."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    assert skip % batch_size == 0 or skip >= len(order), "only whole batches can be skipped"
    return [order[start : start + batch_size] for start in range(skip, len(order), batch_size)]


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer: those of a model's generation settings, and the tokenizer's own."""
    # Community checkpoints often keep the base model's generation settings, which lack the end token of the chat form.
    own = settings.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


def device_named(wanted: str) -> torch.device:
    """The device that a config means, ``auto`` or one of torch's. Raises ``InputError`` if it is not there."""
    return _device(wanted)


def _device(wanted: str) -> torch.device:
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    except RuntimeError as error:
        raise InputError(f"device {wanted!r} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and ranks.world() > 1:
        return _own_gpu(wanted)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {wanted!r} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; "
            "use device = 'auto'"
        )
    return place


def _own_gpu(wanted: str) -> torch.device:
    """The GPU of this rank, which is made the current one, so that nothing strays to another rank's."""
    gpus, number = torch.cuda.device_count(), ranks.local_rank()
    if torch.device("cuda" if wanted == "auto" else wanted).index is not None:
        raise InputError(
            f"device {wanted!r} was asked for by {ranks.world()} processes, which need a GPU each; use device = 'auto'"
        )
    if number >= gpus:
        raise InputError(
            f"this is process {number + 1} on a machine where torch {torch.__version__} sees {gpus} GPUs; start no "
            "more processes than there are GPUs"
        )
    place = torch.device("cuda", number)
    torch.cuda.set_device(place)
    return place


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted == "auto":
        return torch.bfloat16 if bfloat16_pays(device) else torch.float32
    if wanted not in known:
        raise InputError(f"dtype {wanted!r} is unknown; expected auto, {', '.join(known)} or stored")
    return known[wanted]


def _check_weights(network: PreTrainedModel, name: str, missing: list[str]) -> None:
    if missing:
        raise InputError(
            f"the model {name!r} lacks {len(missing)} of its weights, or has them in another size (first: "
            f"{min(missing)}), so that they would be random; use another checkpoint"
        )
    for module_name, module in network.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        with at_hand(module) if own else nullcontext():
            for key in own:
                found = module.get_parameter(key)
                # Of 8 bits there is no such question.
                known = found.float() if found.is_floating_point() and found.element_size() == 1 else found
                if not torch.isfinite(known).all():
                    raise InputError(
                        f"the model {name!r} holds values that are not finite in {module_name}.{key}; the file is "
                        "damaged or the training diverged, use another checkpoint"
                    )
