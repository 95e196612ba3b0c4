"""Pushing to a fake Hub: what arrives, and a sentence for every failure; the licence of a base model, or unknown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from typer.testing import CliRunner

import safeneuron
from safeneuron.cli.app import app
from safeneuron.errors import InputError
from safeneuron.runs.hub import (
    UNKNOWN,
    Licence,
    check_repository,
    legal_files,
    licence_in,
    licence_named,
    licence_of_card,
    licence_on_hub,
    push,
)
from tests.helpers.fake_hub import TOKEN, FakeHub

FILES = {"README.md": b"---\nlicense: mit\n---\n# x\n", "model.safetensors": b"w" * 3000, "reproduce/a.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake Hub that this process takes for the real one, with a token that it accepts."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    yield fake
    close_session()
    fake.close()


@pytest.fixture
def folder(tmp_path):
    """A folder to push."""
    here = tmp_path / "folder"
    for name, content in FILES.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    return here


def message_of(folder, name="owner/model", **options) -> str:
    with pytest.raises(InputError) as error:
        push(folder, name, "message", **options)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    return str(error.value)


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_the_repository_is_made_and_holds_the_folder(hub, folder):
    assert push(folder, "owner/model", "the message") == f"{hub.address}/owner/model"
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}
    assert hub.private == set()
    assert [commit["summary"] for commit in hub.commits] == ["the message"]
    assert list(hub.uploads.values()) == [FILES["model.safetensors"]]


def test_a_private_repository(hub, folder):
    push(folder, "owner/model", "message", private=True)
    assert hub.private == {"owner/model"}


def test_the_streamed_upload_of_hf_xet_ends_the_same(hub, folder, monkeypatch):
    """With hf_xet, small files go another way than above; what large ones do needs a server of its own kind."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ()
    push(folder, "owner/model", "message")
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}


def test_an_empty_repository_is_filled(hub, folder):
    hub.add("owner/model")
    push(folder, "owner/model", "message")
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}


def test_after_a_failure_the_same_call_goes_on(hub, folder):
    hub.broken = {"/commit/": 400}
    assert "it answered 400: this hub is broken" in message_of(folder)
    hub.broken = {}
    push(folder, "owner/model", "message")
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}


# -- a repository that holds something --------------------------------------------------------------------------------


def test_a_repository_with_files_is_left_alone(hub, folder):
    held = {"model-00001-of-00002.safetensors": b"old"}
    hub.add("owner/model", held)
    assert "owner/model exists on the Hub and holds 1 files" in message_of(folder)
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **held}


def test_replace_leaves_no_old_file_behind(hub, folder):
    hub.add("owner/model", {"model-00001-of-00002.safetensors": b"old", "README.md": b"old"})
    push(folder, "owner/model", "message", replace=True)
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}
    assert len(hub.commits) == 1


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_private_goes_into_a_public_repository(hub, folder, replace):
    hub.add("owner/model")
    assert "owner/model exists on the Hub and is public" in message_of(folder, private=True, replace=replace)
    assert hub.repositories["owner/model"] == {".gitattributes": b""}


def test_a_private_repository_takes_what_is_private(hub, folder):
    hub.add("owner/model", private=True)
    push(folder, "owner/model", "message", private=True)
    assert hub.repositories["owner/model"] == {".gitattributes": b"", **FILES}


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token of the Hub; log in with: hf auth login" in message_of(folder)
    assert hub.asked == []


def test_a_token_that_is_not_accepted(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another-token")
    message = message_of(folder)
    assert "the Hub does not accept the token" in message
    assert "another-token" not in message


def test_an_owner_who_is_someone_else(hub, folder):
    assert "the token may not write to someone/model" in message_of(folder, "someone/model")


BAD = ["model", "a/b/c", "/model", "owner/", "own er/model", "owner/mo--del", "owner/.model", "owner/model.git"]


@pytest.mark.parametrize("name", [*BAD, "owner/m..l", "owner/modèle", "", "owner/" + "m" * 97])
def test_a_name_that_no_repository_can_have(name):
    with pytest.raises(InputError, match="expected OWNER/NAME for the repository"):
        check_repository(name)


@pytest.mark.parametrize("name", ["owner/model", "Own-er_1/mo.del-v1.0", "o/m", "owner/" + "m" * 96])
def test_a_name_that_a_repository_can_have(name):
    check_repository(name)


def test_a_hub_that_is_not_there(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached (" in message_of(folder)


def test_offline_mode(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on; unset HF_HUB_OFFLINE" in message_of(folder)


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/api/repos/create", 500, "it answered 500"),
        ("/preupload/", 404, "the Hub does not find owner/model"),
        ("/preupload/", 503, "it answered 503"),
        ("/preupload/", 429, "the Hub asks to slow down"),
        ("/info/lfs/", 403, "the token may not write to owner/model"),
        ("/upload/", 403, "the token may not write to owner/model"),
        ("/verify", 422, "it answered 422"),
        ("/commit/", 412, "it answered 412"),
    ],
)
def test_a_hub_that_fails_on_the_way(hub, folder, where, status, said):
    hub.broken = {where: status}
    message = message_of(folder)
    assert said in message
    assert "this hub is broken" in message
    assert hub.commits == []


def test_a_card_that_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\nlicense: no-such-licence\n---\n")
    assert '"license" must be one of a list' in message_of(folder)


# -- from the shell ---------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
from safeneuron.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
import safeneuron as sn
model = sn.load("owner/model")
from huggingface_hub import hf_hub_download
neurons = sn.NeuronSet.load(hf_hub_download("owner/model", "neurons.json"))
with sn.pruned(model, neurons):
    print("loaded", model.name, model.fingerprint, neurons)
"""


def test_published_pushed_and_loaded_again(hub, finished_run, tmp_path):
    run = finished_run[0]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(safeneuron.__file__).parents[1]),
    }
    target = tmp_path / "T1"
    arguments = ["publish", str(run), "--state", "T1", "--out", str(target), "--hub", "owner/model", "--private"]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/owner/model" in done.stdout
    assert "loaded owner/model" in done.stdout
    held = hub.repositories["owner/model"]
    local = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert held == {".gitattributes": b"", **local}
    assert b'name = "owner/model"' in held["README.md"]
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr


def test_the_folder_is_kept_and_named_where_pushing_fails(hub, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another-token")
    target = tmp_path / "T1"
    done = CliRunner().invoke(
        app, ["publish", str(finished_run[0]), "--state", "T1", "--out", str(target), "--hub", "owner/model"]
    )
    assert done.exit_code == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the Hub does not accept the token")
    assert error.endswith(f"; the folder is written and kept: {target}")
    assert (target / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hub", "model"], "expected OWNER/NAME for the repository on the Hub"),
        (["--private"], "give the repository too, with --hub OWNER/NAME"),
        (["--replace"], "give the repository too, with --hub OWNER/NAME"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(finished_run, tmp_path, options, said):
    target = tmp_path / "T1"
    done = CliRunner().invoke(app, ["publish", str(finished_run[0]), "--state", "T1", "--out", str(target), *options])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert said in line
    assert not target.exists()


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
