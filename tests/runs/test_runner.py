"""The runner: what is done is skipped, what has changed is refused, what is missing is remembered."""

from __future__ import annotations

import pytest

from safeneuron.errors import InputError
from safeneuron.runs.run import Run
from safeneuron.runs.runner import Runner, StageSpec
from safeneuron.runtime.files import read_json, write_json
from tests.helpers.tiny_run import Watch


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run")


def spec(name: str = "T0/first", inputs: tuple[str, ...] = (), **settings: object) -> StageSpec:
    """A stage that writes down how often it has been worked on."""

    def work(folder):
        path = folder / "times.json"
        write_json(path, {"times": (read_json(path)["times"] if path.exists() else 0) + 1})

    return StageSpec(name, settings, inputs, work)


def times(run: Run, name: str) -> int:
    return int(read_json(run.folder / name / "times.json")["times"])


def test_a_stage_is_done_once_told_and_logged(run):
    watch = Watch()
    for _ in range(2):
        Runner(run, watch, logs=True).do(spec())
    assert watch.events == [("began", "T0/first"), ("ended", "T0/first"), ("skipped", "T0/first")]
    assert times(run, "T0/first") == 1
    (line,) = (run.folder / "log.txt").read_text().splitlines()
    assert " T0/first done in " in line


def test_without_a_watcher_and_a_log_it_works_in_silence(run):
    Runner(run).do(spec())
    assert times(run, "T0/first") == 1
    assert not (run.folder / "log.txt").exists()


def test_the_keys_of_inputs_are_part_of_a_stages_own(run):
    runner = Runner(run, keys={"elsewhere": "feed"})
    runner.do(spec())
    runner.do(spec("T0/second", ("T0/first", "elsewhere")))
    record = read_json(run.folder / "T0/second" / "done.json")
    assert record["inputs"] == {"T0/first": runner.keys["T0/first"], "elsewhere": "feed"}
    assert record["key"] == runner.keys["T0/second"]


def test_what_cannot_be_done_yet_is_left_and_what_it_misses_remembered(run):
    runner = Runner(run, kinds=("second",))
    runner.do(spec())
    runner.do(spec("T0/second", ("T0/first",)))
    assert runner.missing == ["T0/first"]
    assert not runner.keys
    assert not (run.folder / "T0").exists()


def test_only_the_kinds_asked_for_are_done_and_the_others_taken_as_they_are(run):
    Runner(run).do(spec())
    runner = Runner(run, kinds=("second",))
    for stage in (spec(), spec("T0/second", ("T0/first",)), spec("T1/first")):
        runner.do(stage)
    assert set(runner.keys) == {"T0/first", "T0/second"}
    assert not (run.folder / "T1").exists()


def test_interrupted_work_goes_on(run):
    def stop(folder):
        write_json(folder / "times.json", {"times": 5})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(run).do(StageSpec("T0/first", {}, [], stop))
    Runner(run).do(spec())
    assert times(run, "T0/first") == 6


def test_other_settings_are_refused(run):
    Runner(run).do(spec(size=1))
    with pytest.raises(InputError, match="size"):
        Runner(run).do(spec(size=2))
    assert times(run, "T0/first") == 1


def test_a_check_does_nothing_but_names_what_has_changed(run):
    runner = Runner(run)
    runner.check(spec(size=1))
    assert not (run.folder / "T0").exists()
    Runner(run).do(spec(size=1))
    with pytest.raises(InputError, match="size"):
        Runner(run).check(spec(size=2))
    Runner(run).check(spec(size=2), remade=["T0/first"])
    assert times(run, "T0/first") == 1


def test_the_kind_of_a_stage_is_the_end_of_its_name():
    assert [spec(name).kind for name in ("data", "T1/attack", "dpo-T1/align")] == ["data", "attack", "align"]
