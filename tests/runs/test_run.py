"""Files are whole or absent, whatever happens; stages know what they were made from; a run has one worker."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeneuron.errors import InputError
from safeneuron.runs.run import Run, Stage
from safeneuron.runtime import files
from tests import ROOT

RECORD = {"a": 1, "b": ["x", None, 2.5], "c": 'zwei\u2028Zeilen\nund "mehr"'}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


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


# -- stages -----------------------------------------------------------------------------------------------------------

SETTINGS = {"align": {"beta": 0.1, "rounds": (1, 2)}, "seed": 0}


def stage(run: Run, settings=SETTINGS, inputs=None) -> Stage:
    return run.stage("T1/align", settings, {"T0/pairs": "k1"} if inputs is None else inputs)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run")


def finish(one: Stage) -> None:
    one.start()
    files.write_text(one.folder / "model" / "x.txt", "hello")
    one.finish(1.234, 56.7)


def test_a_finished_stage_is_done_and_says_what_it_wrote(run):
    assert not stage(run).done
    finish(stage(run))
    assert stage(run).done
    record = files.read_json(run.folder / "T1" / "align" / "done.json")
    assert record["outputs"] == {"model/x.txt": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    assert (record["stage"], record["seconds"], record["peak_memory_mb"]) == ("T1/align", 1.23, 57)
    assert record["inputs"] == {"T0/pairs": "k1"}
    assert names(run.folder / "T1" / "align") == ["done.json", "model"]


def test_the_marker_is_written_last(run, monkeypatch):
    one = stage(run)
    one.start()
    files.write_text(one.folder / "x", "")

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("safeneuron.runs.run.sha256_of", die)
    with pytest.raises(KeyboardInterrupt):
        one.finish(1, 1)
    assert not one.done
    assert names(one.folder) == ["started.json", "x"]


def test_the_key_depends_on_values_and_not_on_their_order():
    assert files.key_of({"a": 1, "b": (1, 2)}) == files.key_of({"b": [1, 2], "a": 1})
    different = [{}, {"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": None}]
    assert len({files.key_of(one) for one in different}) == len(different)


CHANGED = [
    ({"align": {"beta": 0.2, "rounds": (1, 2)}, "seed": 0}, None, ["align.beta was 0.1 and is now 0.2"]),
    ({"align": {"beta": 0.1, "rounds": (1, 3)}, "seed": 0}, None, ["align.rounds was [1, 2] and is now [1, 3]"]),
    ({"align": {"beta": 0.1, "rounds": (1, 2)}}, None, ["seed was 0 and is now None"]),
    ({"align": {"beta": 9, "rounds": ()}, "seed": 1}, None, ["align.beta", "align.rounds", "seed was 0 and is now 1"]),
    (SETTINGS, {"T0/pairs": "k2"}, ["its input T0/pairs changed"]),
    (SETTINGS, {}, ["its input T0/pairs changed"]),
    (SETTINGS, {"T0/pairs": "k1", "T0/select": "k"}, ["its input T0/select changed"]),
]


@pytest.mark.parametrize(("settings", "inputs", "said"), CHANGED)
def test_other_settings_are_refused_by_name_with_old_and_new_value(run, settings, inputs, said):
    finish(stage(run))
    with pytest.raises(InputError) as error:
        _ = stage(run, settings, inputs).done
    for part in [*said, "--redo T1/align", "--out"]:
        assert part in sentence(error)
    assert stage(run).done, "asking has changed nothing"


def test_unfinished_work_is_continued_only_with_the_same_settings(run):
    one = stage(run)
    one.start()
    files.write_text(one.folder / "checkpoints" / "x", "")
    assert not stage(run).done
    with pytest.raises(InputError, match=r"align\.beta was 0\.1"):
        _ = stage(run, CHANGED[0][0]).done


def test_a_stage_that_stopped_before_it_wrote_anything_can_begin_with_other_settings(run):
    stage(run).start()
    other = stage(run, CHANGED[0][0])
    assert not other.done
    finish(other)
    assert other.done
    with pytest.raises(InputError):
        _ = stage(run).done


# -- runs -------------------------------------------------------------------------------------------------------------


def test_creating_a_run_again_opens_it(tmp_path):
    folder = tmp_path / "runs" / "x"
    Run.create(folder)
    before = (folder / "run.json").stat().st_ino
    Run.create(folder)
    assert (folder / "run.json").stat().st_ino == before
    assert json.loads((folder / "run.json").read_text())["kind"] == "run"


def test_a_run_is_not_made_in_a_file_nor_among_other_files(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, said in [(tmp_path / "file", "cannot be written"), (tmp_path / "file" / "run", "cannot be written"),
                         (tmp_path, "holds files but no run")]:  # fmt: skip
        with pytest.raises(InputError) as error:
            Run.create(folder)
        assert said in sentence(error)
        assert "--out" in sentence(error)
    assert names(tmp_path) == ["file"]


def test_a_run_killed_while_it_was_created_can_be_created(tmp_path):
    (tmp_path / ".run.json.1.part").write_text("{")
    assert Run.create(tmp_path).folder == tmp_path


def test_opening_what_is_no_run_is_refused(tmp_path, run):
    for folder in (tmp_path, tmp_path / "nowhere", run.folder):
        with pytest.raises(InputError, match="not the folder of a run"):
            Run.open(folder)
    (run.folder / "config.toml").write_text("")
    assert Run.open(run.folder).folder == run.folder


def test_a_stage_removed_halfway_is_not_there(run, monkeypatch):
    finish(stage(run))

    def die(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            run.remove("T1/align")
    assert not (run.folder / "T1" / "align").exists()
    with run.locked():
        assert names(run.folder / "T1") == [], "the rest is cleared away"
    run.remove("T1/align")


def test_what_a_killed_process_left_half_written_is_cleared_away(run):
    for path in (run.folder / ".config.toml.7.part", run.folder / "T1" / ".model.7.part" / "weights"):
        files.write_text(path, "half")
    files.write_text(run.folder / "T1" / "whole.part", "mine")
    with run.locked():
        assert names(run.folder) == [".lock", "T1", "run.json"]
        assert names(run.folder / "T1") == ["whole.part"]


HOLD = """
import sys
from pathlib import Path
from safeneuron.runs import Run
with Run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_has_one_worker_at_a_time(run):
    root = str(ROOT)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    # Twice: the first refusal must not take the lock away from its holder.
    for _ in range(2):
        with pytest.raises(InputError) as error, run.locked():
            pass
        assert "another process is working" in sentence(error)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with run.locked(), pytest.raises(InputError, match="another process"), run.locked():
        pass
    with run.locked():
        run.log("one")
        run.log("two")
    assert (run.folder / "log.txt").read_text() == "one\ntwo\n"
