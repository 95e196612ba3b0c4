"""The licence of a base model, as its model card, its licence file or the Hub states it, under the Hub's own id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safeneuron.errors import InputError

UNKNOWN = "unknown"
FILES = ("license", "licence", "copying", "notice", "use_policy")
"""How the names of files begin that have to go with a model, in lower case."""

TEXTS = {
    "apache license version 2.0": "apache-2.0",
    "permission is hereby granted free of charge": "mit",
    "llama 3.3 community license": "llama3.3",
    "llama 3.2 community license": "llama3.2",
    "llama 3.1 community license": "llama3.1",
    "meta llama 3 community license": "llama3",
    "llama 2 community license": "llama2",
    "gemma terms of use": "gemma",
}
"""What stands near the beginning of a licence's text, in lower case and without commas, and the licence's id."""


@dataclass(frozen=True)
class Licence:
    """The Hub's id of a licence; for one that has none the id ``other``, with a name and a link."""

    id: str
    name: str = ""
    link: str = ""

    @property
    def known(self) -> bool:
        """Whether anybody has said which licence it is."""
        return self.id != UNKNOWN


def given(text: str) -> Licence:
    """The licence that the user names. Raises ``InputError`` for what cannot be an id of the Hub."""
    name = text.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise InputError(
            f"--license expects the Hub's id of a licence, such as apache-2.0 or llama3.1, but found {text!r}"
        )
    return Licence(name)


def in_folder(folder: Path) -> Licence:
    """The licence of the model in a folder, from the model card there, or else from a licence file; or unknown."""
    licence = of_card(_text(folder / "README.md"))
    if licence.known:
        return licence
    texts = [path for path in legal_files(folder) if not path.name.lower().startswith(("notice", "use_policy"))]
    for path in texts:
        beginning = " ".join(_text(path)[:3000].lower().replace(",", " ").split())
        found = [name for sign, name in TEXTS.items() if sign in beginning]
        if found:
            return Licence(found[0])
    return Licence("other", "license-of-the-base-model", texts[0].name) if texts else Licence(UNKNOWN)


def of_card(text: str) -> Licence:
    """The licence in the metadata of a model card; unknown if it has none."""
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
    fields = {
        key: match[1]
        if front and (match := re.search(rf"^{key}:[ \t]*[\"']?([^\s\"']+)", front[1], re.MULTILINE))
        else ""
        for key in ("license", "license_name", "license_link")
    }
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", fields["license"]):
        return Licence(UNKNOWN)
    return Licence(fields["license"], fields["license_name"], fields["license_link"])


def on_the_hub(name: str, revision: str = "") -> Licence:
    """The licence that the Hub states for a model; unknown if the Hub cannot be asked, or does not know."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        data = HfApi().model_info(name, revision=revision or None, timeout=20).card_data
    except (HTTPError, OSError, ValueError):
        return Licence(UNKNOWN)
    if data is None or not isinstance(data.license, str):
        return Licence(UNKNOWN)
    return Licence(data.license, data.license_name or "", data.license_link or "")


def legal_files(folder: Path) -> list[Path]:
    """The licence, notice and use policy in a model's folder."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.lower().startswith(FILES)]


def _text(path: Path) -> str:
    """What stands in a file that may be missing or hold other things than text."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
