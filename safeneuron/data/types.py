"""What travels through the package instead of text files: a prompt with its images, and a preference pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron.data.images import digest_of, keep_image, name_of
from safeneuron.data.rows import Message
from safeneuron.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One request to a model; the two prompts of a twin share their ``id``.

    ``image`` is an image that goes with it, for vision-language models: the path of a file, the bytes of one, or an
    image of Pillow. ``said`` is what is written beside the image, where that is not the text: of a drawn question,
    ``text`` is the question, which judges and reports see, and the model sees it in the image alone.
    """

    text: str
    category: str = ""
    id: str = ""
    image: Any = None
    said: str = ""

    @property
    def written(self) -> str:
        """What the model is told in writing."""
        return self.said or self.text

    @property
    def key(self) -> tuple[str, str]:
        """What two prompts share that ask a model the same, but for case and spacing."""
        return " ".join(self.written.split()).casefold(), digest_of(self.image)

    def to_record(self, folder: Path | None = None) -> dict[str, str]:
        """Return the prompt as one JSON object, which ``read_prompts`` also understands.

        An image is copied into ``folder/images``, and named relative to ``folder``; without a folder only the path of
        a file can be named. Raises InputError for any other image then.
        """
        record = {"text": self.text, "category": self.category, "id": self.id}
        return record | _image_record(self.image, folder) | ({"said": self.said} if self.said else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path | None = None) -> Prompt:
        """Return the prompt that ``to_record`` wrote into ``folder``. Raises InputError when its text is missing."""
        _require(record, "text")
        image = _image_from(record, folder)
        return cls(record["text"], record.get("category", ""), record.get("id", ""), image, record.get("said", ""))


@dataclass(frozen=True)
class Pair:
    """A preference: the conversation up to the answer, the answer to prefer and the answer to avoid.

    ``image`` is an image that stands at the beginning of the first message of the user; see ``Prompt``.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""
    image: Any = None

    def to_record(self, folder: Path | None = None) -> dict[str, Any]:
        """Return the pair as one JSON object, which ``read_pairs`` also understands; images as of a ``Prompt``."""
        record = {"prompt": [dict(message) for message in self.prompt], "chosen": self.chosen}
        return record | {"rejected": self.rejected, "source": self.source} | _image_record(self.image, folder)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path | None = None) -> Pair:
        """Return the pair that ``to_record`` wrote. Raises InputError when a part of it is missing."""
        _require(record, "prompt", "chosen", "rejected")
        image = _image_from(record, folder)
        return cls(tuple(record["prompt"]), record["chosen"], record["rejected"], record.get("source", ""), image)


def _require(record: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in record:
            raise InputError(f"a record must have '{name}', found only: {', '.join(record) or 'nothing'}")


def _image_record(image: Any, folder: Path | None) -> dict[str, str]:
    if image is None:
        return {}
    if folder is not None:
        return {"image": keep_image(image, folder)}
    if isinstance(image, str | Path):
        return {"image": str(image)}
    raise InputError(f"{name_of(image)} is no file, so a record cannot name it; give the folder to keep it in")


def _image_from(record: Mapping[str, Any], folder: Path | None) -> str | None:
    image = record.get("image")
    return None if not image else str(image if folder is None else folder / image)
