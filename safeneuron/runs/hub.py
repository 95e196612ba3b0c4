"""A folder to a model repository on the Hub: only into one that is empty, and every failure is one sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeneuron.errors import InputError


def check_repository(name: str) -> None:
    """Raise ``InputError`` unless ``name`` can be that of a repository, ``OWNER/NAME``."""
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
    if not re.fullmatch(f"{part}/{part}", name) or "--" in name or ".." in name or name.endswith(".git"):
        raise InputError(
            f"expected OWNER/NAME for the repository on the Hub, of letters, digits, '-', '_' and '.', found {name!r}"
        )


def push(folder: Path, name: str, message: str, private: bool = False, replace: bool = False) -> str:
    """Make the folder the content of the model repository ``name``, creating it if need be, and return its address.

    A repository that holds files already is left alone unless ``replace`` says that its content may go; the history
    keeps it. ``private`` makes a new one private. Raises ``InputError`` for a name that cannot be one, without a token,
    if the Hub cannot be reached or refuses, if the repository holds files, or if it is public and should be private.
    """
    check_repository(name)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    token = get_token()
    if not token:
        raise InputError("pushing needs a token of the Hub; log in with: hf auth login, or set HF_TOKEN")
    api = HfApi(token=token, library_name="safeneuron")
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        info = api.model_info(name)
        files = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
        if private and not info.private:
            raise InputError(f"{name} exists on the Hub and is public; make it private there, or give another name")
        if files and not replace:
            raise InputError(
                f"{name} exists on the Hub and holds {len(files)} files; give another name, or let them go with "
                "--replace (its history keeps them)"
            )
        # Whatever the folder does not hold is deleted in the same commit, so that no old shards stay behind.
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, delete_patterns="*" if files else None
        )
    except InputError:
        raise
    # What huggingface_hub raises: its own errors, which are OSErrors, and ValueError (card refused, malformed answers);
    # HTTPError while it is not answered, RuntimeError around what went wrong with one file, in Python or in hf_xet.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise InputError(_reason(error, name).replace(token, "***")) from error
    return str(url)


def _reason(error: Exception, name: str) -> str:
    """What went wrong and what to do, in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, OfflineModeIsEnabled):
        return "the Hub cannot be reached: offline mode is on; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause.response.status_code, _one_line(cause.server_message or "nothing more"), name)
    said = _one_line(str(cause) or type(cause).__name__)
    if isinstance(cause, HTTPError):
        return f"the Hub cannot be reached ({said}); check the network, and give the same command again"
    return f"the folder could not be pushed to {name} ({said})"


def _refusal(status: int, said: str, name: str) -> str:
    """What a status of the Hub means."""
    advice = {
        401: "the Hub does not accept the token; log in again with: hf auth login, or set HF_TOKEN to another one",
        403: f"the token may not write to {name}; use one with write access there, or give another owner",
        404: f"the Hub does not find {name}; check the owner, and that the token may see it",
        429: "the Hub asks to slow down; wait before you give the same command again",
    }
    meaning = advice.get(status, "the Hub failed; give the same command again later")
    return f"{meaning} (it answered {status}: {said})"


def _one_line(text: str) -> str:
    """The text on one line, of a length for people."""
    line = " ".join(text.split()).rstrip(". ")
    return line if len(line) <= 300 else line[:297] + "..."


UNKNOWN = "unknown"
LICENCE_ID = r"[a-z0-9][a-z0-9.+-]*"
FILES = ("license", "licence", "copying", "notice", "use_policy")
"""How the names of files begin that have to go with a model, in lower case."""


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


def licence_named(text: str) -> Licence:
    """The licence that the user names. Raises ``InputError`` for what cannot be an id of the Hub."""
    name = text.strip().lower()
    if not re.fullmatch(LICENCE_ID, name):
        raise InputError(
            f"--license expects the Hub's id of a licence, such as apache-2.0 or llama3.1, but found {text!r}"
        )
    return Licence(name)


def licence_in(folder: Path) -> Licence:
    """The licence of the model in a folder: what its card says, or else the licence file beside it, unread."""
    licence = licence_of_card(folder / "README.md")
    if licence.known:
        return licence
    texts = [path for path in legal_files(folder) if not path.name.lower().startswith(("notice", "use_policy"))]
    return Licence("other", "license-of-the-base-model", texts[0].name) if texts else Licence(UNKNOWN)


def licence_of_card(path: Path) -> Licence:
    """The licence in the metadata of a model card; unknown if there is no card, or it has none."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        fields = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return Licence(UNKNOWN)
    return _licence_of(fields.get("license"), fields.get("license_name"), fields.get("license_link"))


def _licence_of(name: Any, title: Any, link: Any) -> Licence:
    """The licence that metadata name; unknown for what is no id."""
    if not isinstance(name, str) or not re.fullmatch(LICENCE_ID, name):
        return Licence(UNKNOWN)
    return Licence(name, str(title or ""), str(link or ""))


def licence_on_hub(name: str, revision: str = "") -> Licence:
    """The licence that the Hub states for a model; unknown if the Hub cannot be asked, or does not know."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        data = HfApi().model_info(name, revision=revision or None, timeout=20).card_data
    except (HTTPError, OSError, ValueError):
        return Licence(UNKNOWN)
    return Licence(UNKNOWN) if data is None else _licence_of(data.license, data.license_name, data.license_link)


def legal_files(folder: Path) -> list[Path]:
    """The licence, notice and use policy in a model's folder."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.lower().startswith(FILES)]
