"""Files and folders are whole or absent, whatever happens, and every failure to write them is one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.runs.run import Run
from safeneuron.runtime import files
from tests import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


RECORD = {"a": 1, "b": ["x", None, 2.5], "c": 'zwei\u2028Zeilen\nund "mehr"'}


def python(code: str, **options: object) -> subprocess.Popen[str]:
    """Another process of this Python that can import the package."""
    root = str(ROOT)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root}, **options,
    )  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_written_with_their_folders_and_leave_nothing_beside_them(tmp_path):
    path = tmp_path / "deep" / "er" / "x.json"
    files.write_json(path, RECORD)
    assert files.read_json(path) == RECORD
    files.write_json(path, {"new": True})
    assert files.read_json(path) == {"new": True}
    assert names(path.parent) == ["x.json"]


@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_death_between_writing_and_renaming_leaves_the_old_file_or_none(tmp_path, monkeypatch, death, old):
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)

    def die(*_):
        raise death

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(death):
        files.write_bytes(path, b"new")
    assert names(tmp_path) == ([] if old is None else ["x"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_at_any_point_of_writing_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as error:
            files.write_json(path, RECORD)
    assert "disk is full" in sentence(error)
    assert str(path) in sentence(error)
    assert "free some space" in sentence(error)
    assert names(tmp_path) == ["x.json"]
    assert path.read_text() == "old"


def test_a_file_too_large_for_the_kernel_is_one_sentence_and_not_half_written(tmp_path):
    code = f"""
import resource
from pathlib import Path
from safeneuron.runtime import files as runs
from safeneuron.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path({str(tmp_path)!r})
for write in (lambda: runs.write_bytes(folder / "a", bytes(5000)),
              lambda: runs.append_lines(folder / "b", [{{"text": "x" * 5000}}])):
    try:
        write()
    except InputError as error:
        print(error)
"""
    process = python(code)
    out, err = process.communicate()
    assert err == ""
    assert out.count("disk is full") == 2
    assert names(tmp_path) == ["b"]
    assert files.read_lines(tmp_path / "b") == [], "a torn line is no record"


def test_appending_to_a_full_disk_is_one_sentence():
    with pytest.raises(InputError) as error:
        files.append_lines(Path("/dev/full"), [RECORD])
    assert "disk is full" in sentence(error)


@pytest.mark.parametrize("write", [lambda p: files.write_json(p, {}), lambda p: files.append_lines(p, [{}])])
def test_a_path_below_a_file_is_one_sentence(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        write(tmp_path / "file" / "x.json")
    assert "cannot be written" in sentence(error)
    assert "--out" in sentence(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        files.write_json(tmp_path / "x.json", {})
    with pytest.raises(InputError, match="Permission denied"):
        Run.create(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, value):
    for write in (
        lambda: files.write_json(tmp_path / "x", {"loss": value}),
        lambda: files.write_lines(tmp_path / "x", [{"loss": value}]),
        lambda: files.append_lines(tmp_path / "x", [{"loss": value}]),
    ):
        with pytest.raises(InputError) as error:
            write()
        assert "not finite" in sentence(error)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"), [(None, "does not exist"), ("{", "not valid JSON"), ("[1]", "holds a list"), ("\xff", "JSON")]
)
def test_reading_json_says_what_is_wrong(tmp_path, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        files.read_json(path)
    assert said in sentence(error)
    assert str(path) in sentence(error)


def test_reading_json_from_a_folder_is_one_sentence(tmp_path):
    for read in (files.read_json, files.read_lines):
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path)


# -- streams ----------------------------------------------------------------------------------------------------------
records = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers() | st.none(), max_size=3))


@given(records=records, cut=st.floats(0, 1))
def test_a_stream_cut_at_any_byte_gives_its_whole_records(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("stream") / "x.jsonl"
    files.write_lines(path, records)
    assert files.read_lines(path) == records
    content = path.read_bytes()
    kept = content[: int(cut * len(content))]
    path.write_bytes(kept)
    assert files.read_lines(path) == records[: kept.count(b"\n")]
    shutil.rmtree(path.parent)


def test_appending_goes_on_after_what_is_there(tmp_path):
    path = tmp_path / "x.jsonl"
    assert files.read_lines(path) == []
    files.append_lines(path, [RECORD])
    files.append_lines(path, [{"n": 2}, {"n": 3}])
    assert files.read_lines(path) == [RECORD, {"n": 2}, {"n": 3}]


def test_a_damaged_line_inside_a_stream_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(InputError) as error:
        files.read_lines(path)
    assert f"{path} line 2" in sentence(error)


# -- folders that libraries write -------------------------------------------------------------------------------------


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "model"
    with files.whole_folder(folder) as neighbour:
        (neighbour / "a").write_text("1")
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), files.whole_folder(folder):
        raise KeyboardInterrupt
    assert names(folder) == ["a"]
    with files.whole_folder(folder) as neighbour:
        (neighbour / "c").write_text("3")
    assert names(folder) == ["c"]
    assert names(tmp_path) == ["model"]


FOREIGN = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


@pytest.mark.parametrize("error", FOREIGN)
def test_libraries_own_errors_for_a_full_disk_are_understood(tmp_path, error):
    with pytest.raises(InputError) as found, files.whole_folder(tmp_path / "model"):
        raise error
    assert "disk is full" in sentence(found)
    assert names(tmp_path) == []


def test_other_errors_while_writing_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"^mine$"), files.writing(tmp_path):
        raise InputError("mine")


def test_the_key_depends_on_values_and_not_on_their_order():
    assert files.key_of({"a": 1, "b": (1, 2)}) == files.key_of({"b": [1, 2], "a": 1})
    different = [{}, {"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": None}]
    assert len({files.key_of(one) for one in different}) == len(different)


# -- locks ------------------------------------------------------------------------------------------------------------

TURNS = """
import sys, time
from pathlib import Path
from safeneuron.runtime.files import one_at_a_time
folder = Path(sys.argv[1])
with one_at_a_time(folder / "model"):
    (folder / "inside").mkdir()
    time.sleep(0.2)
    (folder / "inside").rmdir()
"""


def test_processes_take_turns(tmp_path):
    """The folder cannot be made by a second one as long as the first has it."""
    code = TURNS.replace("sys.argv[1]", repr(str(tmp_path)))
    for process in [python(code) for _ in range(3)]:
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot be written") as error,
        files.one_at_a_time(tmp_path / "file" / "model"),
    ):
        pass
    sentence(error)
