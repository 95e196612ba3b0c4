"""The licence of a base model: from its card, its licence file or the Hub, and unknown where nobody says."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from safeneuron.errors import InputError
from safeneuron.runs.hub import (
    UNKNOWN,
    Licence,
    legal_files,
    licence_in,
    licence_named,
    licence_of_card,
    licence_on_hub,
)

MIT = "MIT License\n\nCopyright (c) 2026 Somebody\n\nPermission is hereby granted, free of charge, to any person\n"
BESIDE = Licence("other", "license-of-the-base-model", "LICENSE")
CARDS = {
    "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# Model\n": Licence("apache-2.0"),
    "---\r\ntags:\r\n- a\r\nlicense: 'mit'\r\n---\r\ntext": Licence("mit"),
    "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://x.org/LICENSE#top\n---\n": Licence(
        "other", "qwen-research", "https://x.org/LICENSE#top"
    ),
    "---\nlicense: llama3.1 # as of July\n---\n": Licence("llama3.1"),
    "---\ntags: [a]\n---\nlicense: mit\n": Licence(UNKNOWN),
    "---\nlicense: |\n  long text\n---\n": Licence(UNKNOWN),
    "---\nlicense: [mit, gemma]\n---\n": Licence(UNKNOWN),
    "---\n- license\n---\n": Licence(UNKNOWN),
    "---\nlicense: {\n---\n": Licence(UNKNOWN),
    "license: mit\n": Licence(UNKNOWN),
    "": Licence(UNKNOWN),
}


@pytest.mark.parametrize(("card", "licence"), CARDS.items())
def test_a_card_says_its_licence(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card, newline="")
    assert licence_of_card(tmp_path / "README.md") == licence


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: gemma\n---\n", "LICENSE": MIT}, Licence("gemma")),
        ({"README.md": "# no metadata", "LICENSE": MIT}, BESIDE),
        ({"LICENSE": "x", "NOTICE": MIT, "USE_POLICY.md": "be good"}, BESIDE),
        ({"LICENCE.md": "You may look at it."}, Licence("other", "license-of-the-base-model", "LICENCE.md")),
        ({"NOTICE": MIT}, Licence(UNKNOWN)),
        ({}, Licence(UNKNOWN)),
    ],
)
def test_a_folder_says_its_licence(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_in(tmp_path) == licence


def test_files_that_are_not_text_say_nothing(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00---")
    (tmp_path / "LICENSE").mkdir()
    assert licence_in(tmp_path) == Licence(UNKNOWN)


def test_the_files_that_go_with_a_model(tmp_path):
    for name in ("LICENSE", "Notice.txt", "USE_POLICY.md", "README.md", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    assert [path.name for path in legal_files(tmp_path)] == ["LICENSE", "Notice.txt", "USE_POLICY.md"]


@pytest.mark.parametrize(
    ("text", "name"), [("apache-2.0", "apache-2.0"), (" Llama3.1 ", "llama3.1"), ("c-uda", "c-uda")]
)
def test_the_user_names_a_licence(text, name):
    assert licence_named(text) == Licence(name)


@pytest.mark.parametrize("text", ["", "Apache License", "mit\nbase_model: x", "[mit]", "-x"])
def test_what_cannot_be_a_licence(text):
    with pytest.raises(InputError, match="--license expects the Hub's id of a licence") as error:
        licence_named(text)
    assert "\n" not in str(error.value)


def test_the_hub_says_the_licence(monkeypatch):
    asked = []
    data = SimpleNamespace(license="other", license_name="tongyi-qianwen", license_link=None)

    def info(self, name, *, revision, timeout):
        asked.append((name, revision))
        return SimpleNamespace(card_data=data if name == "owner/model" else None)

    monkeypatch.setattr(HfApi, "model_info", info)
    assert licence_on_hub("owner/model", "abc") == Licence("other", "tongyi-qianwen")
    assert licence_on_hub("owner/without-a-card") == Licence(UNKNOWN)
    assert asked == [("owner/model", "abc"), ("owner/without-a-card", None)]


@pytest.mark.parametrize("name", ["owner/model", "/no/such/folder"])
def test_a_hub_that_cannot_be_asked_says_nothing(name):
    """The tests are offline, and the second is no name for the Hub."""
    assert licence_on_hub(name) == Licence(UNKNOWN)
