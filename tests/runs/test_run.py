"""Files are whole or absent, whatever happens; stages know what they were made from; a run has one worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safeneuron.errors import InputError
from safeneuron.runs.run import Run, Stage
from safeneuron.runtime import files
from tests import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


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
