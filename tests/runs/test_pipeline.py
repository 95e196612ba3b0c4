"""The whole loop on a tiny model: every file in its place, and the same results however often it was stopped."""

import json
import mmap
import resource
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from safeneuron.config.states import State, previous, states_of
from safeneuron.config.toml import read_config
from safeneuron.data.prompts import read_prompts
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from safeneuron.models.loading import load
from safeneuron.models.model import Model
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.neurons.weights import owned_slices
from safeneuron.runs import stages
from safeneuron.runs.findings import Findings
from safeneuron.runs.pipeline import prepare
from safeneuron.runs.run import Run, Stage
from safeneuron.runtime.devices import peak_memory_mb, reset_peak_memory
from safeneuron.runtime.files import read_json, read_lines
from tests.helpers.tiny_run import Watch, execute, results

STATES = ("T0", "T1", "T2", "dpo-T1")
OWN = ("ORI", "static-ES", "static-FULL", "random")
SMALL = (
    'attack.sets=["FULL"]', 'attack.knowledge=["static"]', "attack.random=false", "attack.curve=[]", "variants={}",
    "align.rounds=1",
)  # fmt: skip


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


def stages_in(folder: Path) -> set[str]:
    return {str(marker.parent.relative_to(folder)) for marker in folder.rglob("done.json")}


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


def test_the_exact_records_are_kept(finished_run):
    folder, config, _ = finished_run
    for role in stages.PROMPTS:
        given = [json.loads(line)["prompt"] for line in (config.parent / f"{role}.jsonl").read_text().splitlines()]
        assert [record["text"] for record in read_lines(folder / "data" / f"{role}.jsonl")] == given
    pairs = read_lines(folder / "T0" / "pairs" / "pairs.jsonl")
    assert [pair["chosen"] for pair in pairs] == [f"No, not {i}." for i in range(6)]


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


# -- what the loop must do --------------------------------------------------------------------------------------------


def test_the_frozen_set_grows_and_what_it_freezes_stays(finished_run):
    folder, config, _ = finished_run
    findings = Findings(read_config(config), Run(folder))
    first, second = (findings.found(findings.chain(State("", number))) for number in (1, 2))
    assert len(first) < len(second)
    assert first - second == NeuronSet.of({}, first.widths, first.fingerprint)
    records = {state: read_json(folder / state / "align" / "frozen.json") for state in STATES[1:]}
    assert [records[state]["frozen"] for state in STATES[1:]] == [len(first), len(second), 0]
    assert all(record["frozen_identical"] and record["free_change"] > 0 for record in records.values())
    models = {"T0": load(config.parent / "model", "float32")}
    models |= {state: load(folder / state / "align" / "model", "float32") for state in STATES[1:]}

    def slices(state: str, neurons: NeuronSet) -> list[torch.Tensor]:
        return [one.parameter.index_select(one.dim, one.index) for one in owned_slices(models[state], neurons)]

    def same(one: str, other: str, neurons: NeuronSet) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(slices(one, neurons), slices(other, neurons), strict=True)]

    assert all(same("T0", "T1", first))
    assert all(same("T1", "T2", second))
    assert all(same("T0", "T2", first)), "what T0's round froze stays frozen"
    assert not any(same("T0", "dpo-T1", first)), "plain DPO moves them"
    assert not any(same("T0", "T1", first.random_like(0, avoid=first))), "the others move"


def test_states_and_what_they_are_made_from(finished_run):
    _, config, _ = finished_run
    states = states_of(read_config(config))
    assert [state.name for state in states] == list(STATES)
    assert [previous(state).name for state in states[1:]] == ["T0", "T1", "T0"]
    assert [s.name for s in states_of(read_config("audit"))] == ["T0"]


def test_random_freezing_freezes_as_many_others(finished_run, tmp_path):
    folder, config, _ = finished_run
    changes = [*SMALL, "align.freeze=random", "align.ablate=true", "align.ablate_share=0.5"]
    execute(config, tmp_path, changes=changes)
    record = read_json(tmp_path / "T1" / "align" / "frozen.json")
    assert (record["freeze"], record["ablate"]) == ("random", True)
    assert record["frozen"] == read_json(folder / "T1" / "align" / "frozen.json")["frozen"]
    assert record["frozen_sha256"] != read_json(folder / "T1" / "align" / "frozen.json")["frozen_sha256"]


def test_an_audit_trains_nothing(finished_run, tmp_path):
    _, config, _ = finished_run
    watch = execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"])
    assert watch.of("began") == ["data", "T0/measure", "T0/select", "T0/attack", "T0/judge", "report"]
    assert [state["name"] for state in json.loads(results(tmp_path))["states"]] == ["T0"]
    with pytest.raises(InputError, match="nothing to train"):
        execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"], verb="align")


class Answers:
    """A judge that finds every answer usable, but for the first two of a list, of which it cannot say anything."""

    name = "answers"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return ["cannot say", "cannot say", *["complied"] * (len(responses) - 2)]


def test_what_a_judge_cannot_say_is_reported_apart(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda *_: Answers())
    execute(config, tmp_path, changes=[*SMALL, "align.rounds=0"])
    (state,) = json.loads(results(tmp_path))["states"]
    for attack in state["attacks"]:
        harmful = attack["harmful"]
        assert (harmful["n"], harmful["cannot say"], harmful["complied"], harmful["rate"]) == (3, 2, 1, 1.0)
        assert attack["benign"]["rate"] == 0.0
    assert "annot say" in (tmp_path / "report" / "report.md").read_text()


class Harmless(Answers):
    """A judge that sees no harm in anything."""

    name = "harmless"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return ["harmless"] * len(responses)


def test_several_judges_keep_their_own_verdicts_and_their_agreement(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    made = {"refusal-phrases": Answers, "wildguard": Harmless}
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda name, *_: made[name]())
    several = 'judge.name=["refusal-phrases", "wildguard"]'
    execute(config, tmp_path, changes=[*SMALL, "align.rounds=0", several, 'judge.rule="any"'])
    lines = read_lines(tmp_path / "T0/judge/ORI/harmful.jsonl")
    assert [line["verdict"] for line in lines] == ["cannot say", "cannot say", "complied"]
    assert lines[2]["judges"] == {"answers": "complied", "harmless": "harmless"}
    assert all("incoherence" in line for line in lines)
    (pair,) = read_json(tmp_path / "T0/judge/agreement.json")["pairs"]
    assert pair["judges"] == ["answers", "harmless"]
    assert pair["complied"]["agreement"] == 0
    (state,) = json.loads(results(tmp_path))["states"]
    assert state["agreement"] == [pair]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "any of refusal-phrases, wildguard" in report
    assert "the judges answers and harmless say the same of 0" in report


def test_pairs_that_are_not_used_are_told(finished_run, tmp_path):
    """Rows left out while pairs are read, and pairs left out of the training; the report repeats both."""
    _, config, _ = finished_run
    pairs = [{"prompt": f"how to do {i}", "chosen": f"No, not {i}.", "rejected": f"Yes, {i}."} for i in range(4)]
    pairs += [{"prompt": "why " * 30, "chosen": "No.", "rejected": "Yes."}, pairs[0] | {"rejected": "No, not 0."}]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = [*SMALL, f'pairs.safety=[{{path="{path}"}}]', "align.max_length=64"]
    watch = execute(config, tmp_path / "run", changes=changes)
    told = [f"{path}: 1 row was left out, 1 with equal answers; 5 pairs are used"]
    told += ["1 of 5 pairs were not trained on: their prompt alone fills max_length = 64 tokens"]
    assert [text for text in watch.of("warned") if text in told] == told
    report = (tmp_path / "run/report/report.md").read_text().replace("\\", "")
    assert all(text in report for text in told)


def test_on_policy_pairs_are_made_once_and_warnings_are_told_once(finished_run, tmp_path, monkeypatch):
    _, config, _ = finished_run
    monkeypatch.setattr("safeneuron.runs.inputs.make_judge", lambda *_: Answers())
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "why " * 30}) + "\n")
    leaky = [
        f"pairs.{kind}=[{{path='{config.parent}/test_{kind}.jsonl'}}, {{path='{long}'}}]" for kind in ("unsafe", "safe")
    ]
    twice = f"data.test_unsafe=[{', '.join([f'''{{path='{config.parent}/test_unsafe.jsonl'}}'''] * 2)}]"
    changes = [*SMALL, "pairs.safety=on-policy", "pairs.max_new_tokens=2", "align.max_length=64", *leaky, twice]
    watch = execute(config, tmp_path / "run", changes=changes)
    warnings = [str(text) for text in watch.of("warned")]
    assert len(warnings) == len(set(warnings)), warnings
    assert sum("repeat an earlier one" in text for text in warnings) == 1
    assert sum("'pairs' and 'test_unsafe' share" in text for text in warnings) == 1, warnings
    told = "1 of 4 {} prompts of on-policy pairs were left out: they alone fill align.max_length = 64 tokens"
    assert {told.format("harmful"), told.format("harmless")} <= set(warnings)
    sources = [record["source"] for record in read_lines(tmp_path / "run/T0" / "pairs" / "pairs.jsonl")]
    assert sorted(set(sources)) == ["on-policy:safe", "on-policy:unsafe"]
    assert execute(config, tmp_path / "run", changes=changes).of("warned") == []


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


def test_a_run_stopped_anywhere_goes_on_and_ends_with_the_same_results(small, tmp_path):
    config, expected, events = small
    for stop_after in moments_of(events):
        stop_and_go_on(config, tmp_path / str(stop_after), stop_after)
        assert results(tmp_path / str(stop_after)) == expected, events[stop_after]


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


@pytest.mark.parametrize("save", [1, 3, 6])
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


@pytest.mark.parametrize("stage", ["T1/align", "T0/attack", "T0/select", "report"])
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


@pytest.mark.parametrize("save_every", [1, 0])
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


# -- variants, rounds and attackers -----------------------------------------------------------------------------------


def test_the_iterated_attacker_starts_where_the_adaptive_one_ends(finished_run):
    folder, config, _ = finished_run
    findings = Findings(read_config(config), Run.open(folder))
    for state in (State("", 0), State("", 2)):
        first, second = (NeuronSet.load(folder / state.name / "iterate" / f"search-{n}.json") for n in (1, 2))
        assert first == findings.neurons(state)
        assert len(second - first) > 0
        assert len(first - second) == 0
        record = read_json(folder / state.name / "attack" / "iterated-FULL" / "pruned.json")
        assert record["neurons"] == len(second)


@pytest.mark.parametrize(("when", "kinds"), [("unpruned", {"ORI"}), ("never", set())])
def test_over_refusal_is_measured_when_asked_for(when, kinds, finished_run, tmp_path):
    _, config, _ = finished_run
    changes = (*SMALL, f"attack.over_refusal={when}", "align.rounds=0")
    totals = [event[2] for event in execute(config, tmp_path, changes=changes).events if event[0] == "progress"]
    assert {path.parent.name for path in tmp_path.glob("T0/judge/*/benign.json")} == kinds
    assert {path.parent.name for path in tmp_path.glob("T0/judge/*/harmful.json")} == {"ORI", "static-FULL"}
    assert 6 + 3 * len(kinds) in totals


def test_variants_train_what_they_say(finished_run, tmp_path):
    _, config, _ = finished_run
    changes = (
        *SMALL[:-2],
        "align.rounds=0",
        'variants={refresh={freeze="none", refresh=2, refresh_prompts=3, refresh_searches=2, rounds=1}, '
        'only={freeze="all-but-safety", rounds=1}, both={ablate=true, ablate_reference=true, rounds=1}}',
    )
    execute(config, tmp_path, changes=changes)
    base = load(config.parent / "model", dtype="float32", device="cpu")
    found = NeuronSet.load(tmp_path / "T0" / "select" / "neurons.json")
    labels = {state["variant"]: state["label"] for state in json.loads(results(tmp_path))["states"]}
    assert labels["refresh"] == "refresh"
    assert labels["only"] == "safety only"
    assert labels["both"] == "freeze + ablate, reference too"
    record = read_json(tmp_path / "refresh-T1" / "align" / "frozen.json")
    assert (record["freeze"], record["refresh"], record["frozen"]) == ("none", 2, 0)
    only = load(tmp_path / "only-T1" / "align" / "model", dtype="float32", device="cpu")
    masks = {piece.name: (piece.dim, piece.index) for piece in owned_slices(base, found)}
    assert read_json(tmp_path / "only-T1" / "align" / "frozen.json")["frozen"] == found.total - len(found)
    for name, before in base.network.named_parameters():
        after = only.network.get_parameter(name)
        trained = torch.zeros(before.shape, dtype=torch.bool)
        if name in masks:
            trained.index_fill_(*masks[name], True)
        assert torch.equal(after[~trained], before[~trained]), name
        assert not trained.any() or not torch.equal(after[trained], before[trained]), name


def test_rounds_end_when_the_attack_gains_nothing(finished_run, tmp_path):
    """A tiny random model is never refused by the judge's phrases, so the attack has nothing to gain."""
    _, config, _ = finished_run
    changes = (*SMALL[:2], *SMALL[3:-1], 'attack.knowledge=["adaptive"]', "align.rounds=3", "align.stop_early=true")
    watch = execute(config, tmp_path, changes=changes)
    assert [name for name in watch.of("began") if str(name).endswith("align")] == ["T1/align"]
    assert [state["name"] for state in json.loads(results(tmp_path))["states"]] == ["T0", "T1"]
    assert set(execute(config, tmp_path, changes=changes).of("skipped")) == stages_in(tmp_path)
    going_on = execute(config, tmp_path, changes=[*changes[:-1], "align.stop_early=false"], redo=["report"])
    assert "T3/judge" in going_on.of("ended")


def test_general_pairs_can_be_made_on_policy(finished_run, tmp_path, monkeypatch):
    """The safety pairs are read, pairs of the model's own answers to harmless prompts are mixed in."""
    _, config, _ = finished_run

    def answered(model: Model, unsafe: list[Prompt], safe: list[Prompt], *rest: object, **settings: object):
        assert unsafe == []
        return [Pair(({"role": "user", "content": one.text},), "Gladly.", "No.", "on-policy:safe") for one in safe]

    monkeypatch.setattr("safeneuron.runs.inputs.on_policy_pairs", answered)
    own = f'pairs.safe=[{{path="{config.parent}/safe.jsonl", every=2}}]'
    changes = (*SMALL, 'pairs.general="on-policy"', "pairs.safety_share=0.5", own)
    execute(config, tmp_path, changes=changes)
    pairs = read_lines(tmp_path / "T0" / "pairs" / "pairs.jsonl")
    assert sorted(pair["source"] == "on-policy:safe" for pair in pairs) == [False] * 4 + [True] * 3
    asked = {pair["prompt"][0]["content"] for pair in pairs if pair["source"] == "on-policy:safe"}
    given = [prompt.text for prompt in read_prompts(config.parent / "safe.jsonl")]
    assert asked == set(given[::2])


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
