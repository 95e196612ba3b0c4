"""The one exception that stands for a mistake of the user, not of the program, and the hint that its messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do about it.

    The command line prints the message and ends with exit code 2; Python callers can catch it as a ``ValueError``.
    """


class RenamedSetting(DeprecationWarning):
    """A setting or a value was given under its old name, which is still understood."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word most like ``word``, or nothing when none is close."""
    matches = get_close_matches(word, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
