"""The whole loop on a tiny model: every file in its place, and the same results however often it was stopped."""

import json
import mmap
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from safeneuron.config.toml import read_config
from safeneuron.errors import InputError
from safeneuron.models.model import Model
from safeneuron.runs import stages
from safeneuron.runs.pipeline import prepare
from safeneuron.runs.run import Run, Stage
from safeneuron.runtime.devices import peak_memory_mb, reset_peak_memory
from safeneuron.runtime.files import read_json, read_lines
from tests import rarely
from tests.helpers.tiny_run import SMALL, STATES, Watch, execute, results, stages_in

OWN = ("ORI", "static-ES", "static-FULL", "random")


@pytest.fixture
def world(finished_run, tmp_path):
    """A copy of the finished run, free to be changed: ``(its folder, its config)``."""
    folder, config, _ = finished_run
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", config


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def stamps(folder: Path) -> dict[str, int]:
    return {name: (folder / name / "done.json").stat().st_mtime_ns for name in stages_in(folder)}


# -- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file_of_its_directory(finished_run):
    folder, _, _ = finished_run
    expected = {"config.toml", "run.json", "log.txt", "report/done.json", "data/done.json", "data/warnings.json"}
    expected |= {f"data/{role}.jsonl" for role in stages.PROMPTS}
    expected |= {f"report/{name}" for name in ("report.html", "report.md", "results.json", "tables/attacks.csv")}
    expected |= {"T0/pairs/pairs.jsonl", "T0/pairs/warnings.json", "T0/pairs/done.json"}
    for state in STATES:
        expected |= {f"{state}/{stage}/done.json" for stage in ("measure", "select", "iterate", "attack", "judge")}
        expected |= {f"{state}/iterate/search-{number}.json" for number in (1, 2)}
        expected |= {f"{state}/select/{name}" for name in ("ES.json", "SAS.json", "neurons.json", "thresholds.json")}
        expected |= {f"{state}/measure/stats.safetensors", f"{state}/select/scores.safetensors"}
        expected.add(f"{state}/attack/plan.json")
        attacks = [*OWN, "iterated-FULL", *(() if state == "T0" else ("adaptive-ES", "adaptive-FULL"))]
        for attack in attacks:
            expected.add(f"{state}/attack/{attack}/pruned.json")
            for kind in ("harmful", "benign"):
                expected |= {f"{state}/{where}/{attack}/{kind}.jsonl" for where in ("attack", "judge")}
                expected.add(f"{state}/judge/{attack}/{kind}.json")
        expected |= {f"{state}/attack/curve-0.02/{name}" for name in ("harmful.jsonl", "pruned.json")}
        expected |= {f"{state}/judge/curve-0.02/harmful.{end}" for end in ("json", "jsonl")}
        if state != "T0":
            expected |= {
                f"{state}/align/{name}"
                for name in ("done.json", "frozen.json", "memory.json", "train.jsonl", "warnings.json")
            }
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    models = {name for name in found if "/align/model/" in name}
    figures = {name for name in found if name.startswith(("report/figures/", "report/tables/"))}
    assert found - models - figures - expected == {".lock"}
    assert expected - found == set()
    assert {f"{state}/align/model/model.safetensors" for state in STATES[1:]} <= models
    assert {"report/figures/attack.svg", "report/figures/layers.svg", "report/figures/training.svg"} <= figures


def test_stages_come_in_order_and_each_tells_its_progress(finished_run):
    _, _, watch = finished_run
    stages = ("measure", "select", "iterate", "attack", "judge")
    examined = [[f"{state}/{stage}" for stage in stages] for state in STATES]
    trained = [["T0/pairs", "T1/align"], ["T2/align"], ["dpo-T1/align"], ["report"]]
    order = ["data", *(stage for pair in zip(examined, trained, strict=True) for part in pair for stage in part)]
    assert watch.of("began") == order
    assert watch.of("ended") == order
    assert watch.of("skipped") == []
    stage, seen = "", []
    for event in [*watch.events, ("began", "end")]:
        if event[0] == "progress":
            seen.append(event[1:])
        elif event[0] == "began":
            if stage.split("/")[-1] in ("measure", "attack", "judge", "align"):
                assert [total for _, total in seen] == [seen[-1][1]] * len(seen), f"{stage}: one estimate of the whole"
                assert [done for done, _ in seen] == sorted({done for done, _ in seen}), f"{stage}: each step counts"
                assert seen[-1][0] == seen[-1][1], f"{stage}: ends at the whole"
            stage, seen = event[1], []


def test_a_second_execution_skips_everything(world):
    folder, config = world
    before = stamps(folder)
    watch = execute(config, folder)
    assert watch.of("began") == []
    assert set(watch.of("skipped")) == stages_in(folder)
    assert len(watch.of("skipped")) == len(stages_in(folder)), "each stage is told of once"
    assert stamps(folder) == before


def test_an_audit_trains_nothing(finished_run, tmp_path):
    _, config, _ = finished_run
    watch = execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"])
    assert watch.of("began") == ["data", "T0/measure", "T0/select", "T0/attack", "T0/judge", "report"]
    assert [state["name"] for state in json.loads(results(tmp_path))["states"]] == ["T0"]
    with pytest.raises(InputError, match="nothing to train"):
        execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"], verb="align")


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(finished_run, tmp_path_factory):
    """A smaller config, with its uninterrupted run: ``(config, results, events)``."""
    _, path, _ = finished_run
    config = read_config(path, SMALL)
    folder = tmp_path_factory.mktemp("small") / "run"
    watch = execute(config, folder)
    return config, results(folder), [event for event in watch.events if event[0] not in ("warned", "noted")]


def stop_and_go_on(config, folder: Path, stop_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(config, folder, Watch(stop_after))
    assert not (folder / "report" / "done.json").exists()
    execute(config, folder)


def moments_of(events: list[tuple[object, ...]]) -> list[int]:
    """Places to stop at: the very start and end, and in each kind of stage of T1 the beginning, a middle, the end."""
    found = [0, events.index(("began", "report"))]
    for kind in ("align", "measure", "attack", "judge"):
        first, last = (events.index((what, f"T1/{kind}")) for what in ("began", "ended"))
        found += [first, (first + last) // 2, last] if kind in ("align", "attack") else [first + 1]
    return found


# The middle of training and the middle of answering are the fast ones.
@pytest.mark.parametrize("place", [at if at == 3 else rarely(at) for at in range(10)])
def test_a_run_stopped_anywhere_goes_on_and_ends_with_the_same_results(small, tmp_path, place):
    config, expected, events = small
    moments = moments_of(events)
    assert len(moments) == 10
    stop_after = moments[place]
    stop_and_go_on(config, tmp_path, stop_after)
    assert results(tmp_path) == expected, events[stop_after]


@pytest.mark.slow
def test_a_run_stopped_again_and_again_gets_there(finished_run, tmp_path):
    folder, config, watch = finished_run
    stops = 0
    while not (tmp_path / "report" / "done.json").exists():
        with suppress(KeyboardInterrupt):
            execute(config, tmp_path, Watch(stop_after=17))
        stops += 1
        assert stops < len(watch.events), "each execution must get further"
    assert stops > 10
    assert results(tmp_path) == results(folder)


def test_answers_continue_after_a_torn_line(small, tmp_path):
    config, expected, events = small
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path, Watch(events.index(("began", "T1/attack")) + 1))
    (stream,) = (tmp_path / "T1" / "attack").glob("*/*.jsonl")
    whole = stream.read_bytes()
    assert whole.count(b"\n") == 2
    stream.write_bytes(whole[:-5])
    execute(config, tmp_path)
    assert results(tmp_path) == expected


@pytest.mark.parametrize("save", [rarely(1), 3, rarely(6)])
def test_training_killed_while_it_saves_continues_from_a_whole_checkpoint(small, tmp_path, monkeypatch, save):
    config, expected, _ = small
    write, calls = torch.save, []

    def die(*arguments, **options):
        calls.append(None)
        if len(calls) == save:
            raise KeyboardInterrupt
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            execute(config, tmp_path)
    assert list((tmp_path / "T1" / "align" / "checkpoints").iterdir())
    watch = execute(config, tmp_path)
    steps = [event[1] for event in watch.events if event[0] == "progress" and event[2] == 4]
    assert steps[0] == 1 + (save - 1) // 3, "three files are saved each step"
    assert results(tmp_path) == expected


@pytest.mark.slow
def test_training_killed_after_its_last_step_trains_no_further(small, tmp_path, monkeypatch):
    config, expected, _ = small

    def die(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Model, "save", die)
        with pytest.raises(KeyboardInterrupt):
            execute(config, tmp_path)
    execute(config, tmp_path)
    assert len(read_lines(tmp_path / "T1" / "align" / "train.jsonl")) == 4
    assert results(tmp_path) == expected


@pytest.mark.parametrize("stage", ["T1/align", rarely("T0/attack"), rarely("T0/select"), rarely("report")])
def test_killed_between_the_work_and_its_marker(small, tmp_path, monkeypatch, stage):
    config, expected, _ = small
    finish = Stage.finish

    def die(self, seconds, memory):
        if self.name == stage:
            raise KeyboardInterrupt
        finish(self, seconds, memory)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            execute(config, tmp_path)
    execute(config, tmp_path)
    assert results(tmp_path) == expected


@pytest.mark.parametrize("save_every", [1, rarely(0)])
def test_a_full_disk_while_a_model_is_saved_is_one_sentence_and_the_run_goes_on_later(small, tmp_path, save_every):
    config, expected, _ = small
    config = config.model_copy(update={"align": config.align.model_copy(update={"save_every": save_every})})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(InputError) as error:
            execute(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "disk is full" in sentence(error)
    assert "T1/align" in sentence(error)
    assert not list(tmp_path.rglob(".*.part"))
    assert not (tmp_path / "T1" / "align" / "model").exists()
    execute(config, tmp_path)
    assert results(tmp_path) == expected


# -- doing a stage again ----------------------------------------------------------------------------------------------


def test_redo_makes_a_stage_and_what_follows_again_and_nothing_else(world, finished_run):
    folder, config = world
    before = stamps(folder)
    watch = execute(config, folder, redo=["T1/attack"])
    assert watch.of("began") == ["T1/attack", "T1/judge", "report"]
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {"T1/attack", "T1/judge", "report"}
    assert results(folder) == results(finished_run[0])


def test_redo_of_a_kind_means_all_states(world):
    folder, config = world
    watch = execute(config, folder, redo=["judge"], changes=["report.examples=1"])
    assert watch.of("began") == [*(f"{state}/judge" for state in STATES), "report"]


def test_redo_of_what_is_not_there_names_what_is(world):
    folder, config = world
    before = stamps(folder)
    with pytest.raises(InputError, match="no such stage") as error:
        execute(config, folder, redo=["T1/attack", "T1/atack"])
    assert "did you mean 'T1/attack'" in sentence(error)
    assert stamps(folder) == before


def test_what_is_deleted_goes_before_what_it_was_made_from(world):
    folder, config = world
    inputs = {name: set(read_json(folder / name / "done.json")["inputs"]) for name in stages_in(folder)}
    run = Run(folder)
    gone = prepare(read_config(config), run, Watch(), ["measure"])
    assert set(gone) == inputs.keys() - {"data", "T0/pairs"}
    for place, name in enumerate(gone):
        assert not inputs[name] & set(gone[:place]), name
    assert stages_in(folder) == {"data", "T0/pairs"}


# -- changed settings -------------------------------------------------------------------------------------------------


CHANGES = [
    ("seed=1", ["seed was 0 and is now 1", "T0/attack"]),
    ("measure.pooling=mean", ["measure.pooling was 'last' and is now 'mean'", "--redo T0/measure"]),
    ("select.density=0.06", ["select.density was 0.05 and is now 0.06", "--redo T0/select"]),
    ("attack.max_new_tokens=4", ["attack.max_new_tokens was 3 and is now 4", "--redo T0/attack"]),
    ("judge.name=llama-guard-3-1b", ["judge.name was 'refusal-phrases'", "--redo T0/judge"]),
    ("pairs.count=5", ["pairs.count was None and is now 5", "--redo T0/pairs"]),
    ("align.beta=0.2", ["align.beta was 0.1 and is now 0.2", "--redo T1/align"]),
    ("variants.dpo.beta=0.3", ["align.beta was 0.1 and is now 0.3", "--redo dpo-T1/align"]),
    ("report.examples=0", ["report.examples was 3 and is now 0", "--redo report"]),
    ("align.label=mine", ["labels. was '' and is now 'mine'", "--redo report"]),
    ("align.rounds=3", ["input T3/", "--redo report"]),
    ("variants={}", ["labels.dpo was '' and is now None", "--redo report"]),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_changed_setting_is_refused_before_anything_happens(finished_run, change, said):
    folder, config, _ = finished_run
    text, before = (folder / "config.toml").read_text(), stamps(folder)
    with pytest.raises(InputError) as error:
        execute(config, folder, changes=[change])
    for part in said:
        assert part in sentence(error)
    assert (folder / "config.toml").read_text() == text, "the run keeps the config that it was made with"
    assert stamps(folder) == before


def test_redo_with_a_changed_setting_makes_only_what_depends_on_it(world):
    folder, config = world
    watch = execute(config, folder, changes=["variants.dpo.beta=0.3"], redo=["dpo-T1/align"])
    assert {str(name).split("/")[0] for name in watch.of("began")} == {"dpo-T1", "report"}
    assert read_config(folder / "config.toml").variant("dpo").beta == 0.3
    watch = execute(config, folder, changes=["variants.dpo.beta=0.3", "align.label=mine"], redo=["report"])
    assert watch.of("began") == ["report"]


def test_a_refused_change_deletes_nothing_that_was_to_be_redone(world):
    folder, config = world
    before = stamps(folder)
    with pytest.raises(InputError, match=r"align\.beta"):
        execute(config, folder, changes=["align.beta=0.2"], redo=["report"])
    assert stamps(folder) == before


@pytest.mark.parametrize(("file", "stage"), [("test_safe.jsonl", "data"), ("pairs.jsonl", "T0/pairs")])
def test_an_edited_file_is_noticed(world, file, stage):
    folder, config = world
    original = (config.parent / file).read_text()
    try:
        (config.parent / file).write_text(original.replace("1", "one"))
        with pytest.raises(InputError, match=f"--redo {stage}") as error:
            execute(config, folder)
        assert file in sentence(error)
    finally:
        (config.parent / file).write_text(original)


def test_a_mistake_in_the_config_can_be_corrected_before_anything_is_finished(finished_run, tmp_path):
    _, config, _ = finished_run
    with pytest.raises(InputError, match="does not exist"):
        execute(config, tmp_path, changes=["data.safe=[{path='nowhere.jsonl'}]"])
    changes = [*SMALL, "align.rounds=0"]
    with pytest.raises(InputError, match="no neuron of T0 exceeds the thresholds"):
        execute(config, tmp_path, changes=[*changes, "select={effect_size=1e9, shift=1e9}"])
    execute(config, tmp_path, changes=changes)
    assert (tmp_path / "report" / "done.json").exists()


# -- one verb at a time -----------------------------------------------------------------------------------------------


def test_verbs_do_their_stage_alone_and_together_the_whole_run(small, tmp_path):
    config, expected, _ = small
    for verb in ("measure", "select", "align", "measure", "select", "attack", "report"):
        watch = execute(config, tmp_path, verb=verb)
        kinds = {"attack": {"attack", "judge"}, "align": {"pairs", "align"}, "measure": {"data", "measure"}}
        began = {str(name).split("/")[-1] for name in watch.of("began")}
        assert began
        assert began <= kinds.get(verb, {verb})
    assert results(tmp_path) == expected


@pytest.mark.parametrize(
    ("verb", "done", "missing"),
    [
        ("select", [], "T0/measure has not been made yet; do it first with: safeneuron measure"),
        ("attack", [], "T0/measure"),
        ("attack", ["measure"], "T0/select has not been made yet; do it first with: safeneuron select"),
        ("align", ["measure"], "T0/select"),
        ("report", ["measure", "select"], "T0/attack has not been made yet; do it first with: safeneuron attack"),
        ("report", ["measure", "select", "attack"], "T0/pairs has not been made yet; do it first with: safeneuron al"),
    ],
)
def test_a_verb_whose_input_is_missing_names_the_one_to_give_first(small, tmp_path, verb, done, missing):
    config, _, _ = small
    config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"safety": "on-policy"})})
    for earlier in done:
        execute(config, tmp_path, verb=earlier)
    with pytest.raises(InputError) as error:
        execute(config, tmp_path, verb=verb)
    assert missing in sentence(error)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_of_memory_is_that_of_the_stage():
    reset_peak_memory()
    before = peak_memory_mb()
    with mmap.mmap(-1, 64 * 2**20) as block:
        for _ in range(64):
            block.write(bytes(2**20))
        assert peak_memory_mb() > before + 60
    assert peak_memory_mb() > before + 60
    reset_peak_memory()
    assert peak_memory_mb() < before + 60
