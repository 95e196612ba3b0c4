"""Capability through lm-evaluation-harness: scores against a slow version by hand, on tiny files and a tiny model."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from safeneuron.config.toml import parse_config, read_config
from safeneuron.errors import InputError
from safeneuron.evaluation.capability import TASKS, benchmark, share_of_correct
from safeneuron.neurons.interventions import pruned
from safeneuron.neurons.neuron_set import NeuronSet
from safeneuron.runs.show import explain
from tests.helpers import tiny, tiny_run

WORDS = ("stone", "a river", "the moon and stars", "salt", "an old red door", "rain")


@pytest.fixture(scope="module", autouse=True)
def _harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'safeneuron[eval]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six made questions of each kind, in files of the shapes that the tasks read."""
    place = tmp_path_factory.mktemp("questions")
    arc = [
        {"query": f"Question: which is {i}?", "choices": list(WORDS[i % 3 : i % 3 + 3]), "gold": i % 3}
        for i in range(6)
    ]
    maths = [{"question": f"What is {i} + 1?", "answer": f"It is {i} + 1.\n#### {i + 1}"} for i in range(6)]
    for name, rows in (("arc_challenge.jsonl", arc), ("gsm8k_test.jsonl", maths)):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    # With the mark at its beginning that the authors' file has.
    with (place / "TruthfulQA.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        for i in range(6):
            row = [
                "",
                "",
                f"What is {i}? ",
                WORDS[i],
                f"{WORDS[i]}; {WORDS[i - 1]} ;",
                f"{WORDS[i - 2]}; {WORDS[i - 3]}",
                "",
            ]
            writer.writerow(row)
    return place


@pytest.fixture(scope="module")
def model():
    return tiny.model(max_position_embeddings=2048)


def log_probability(model, before: str, answer: str) -> float:
    """Of the answer's bytes after the text before it, token by token."""
    start, ids = len(model.tokenizer(before)["input_ids"]), model.tokenizer(before + answer)["input_ids"]
    with torch.inference_mode():
        logs = model.network(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_arc_is_the_choice_that_is_likeliest_by_length(model, folder):
    rows = [json.loads(line) for line in (folder / "arc_challenge.jsonl").read_text().splitlines()]
    right, right_by_length = [], []
    for row in rows:
        logs = [log_probability(model, f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        by_length = [log / len(choice) for log, choice in zip(logs, row["choices"], strict=True)]
        right.append(logs.index(max(logs)) == row["gold"])
        right_by_length.append(by_length.index(max(by_length)) == row["gold"])
    found = benchmark(model, "arc_challenge", str(folder), shots=0, batch_size=4)
    assert found.metrics["acc,none"][0] == pytest.approx(sum(right) / 6)
    assert found.value == pytest.approx(sum(right_by_length) / 6)
    spread = math.sqrt(sum((hit - found.value) ** 2 for hit in right_by_length) / 5 / 6)
    assert found.stderr == pytest.approx(spread)
    assert (found.n, found.shots, found.metric, found.source) == (6, 0, "acc_norm,none", "files")


def test_truthfulqa_by_hand(model, folder):
    from lm_eval.tasks.manager import load_yaml

    own = load_yaml(Path(benchmark.__code__.co_filename).with_name("tasks") / "truthfulqa_mc1.yaml", resolve_func=False)
    examples = own["doc_to_text"].partition("prompt_qa = '")[2].partition("'%}")[0].strip()
    examples = "\n".join(line.strip() for line in examples.splitlines())
    best, share = [], []
    for i in range(6):
        before = f"{examples}\n\nQ: What is {i}?\nA:"
        correct, incorrect = (WORDS[i], WORDS[i - 1]), (WORDS[i - 2], WORDS[i - 3])
        logs = {word: log_probability(model, before, f" {word}") for word in (*correct, *incorrect)}
        best.append(logs[WORDS[i]] == max(logs[word] for word in (WORDS[i], *incorrect)))
        share.append(sum(math.exp(logs[w]) for w in correct) / sum(math.exp(log) for log in logs.values()))
    assert benchmark(model, "truthfulqa_mc1", str(folder)).value == pytest.approx(sum(best) / 6)
    # Shots are not for TruthfulQA, whose prompt has its own examples.
    found = benchmark(model, "truthfulqa_mc2", str(folder), shots=3)
    assert found.value == pytest.approx(sum(share) / 6, rel=1e-3)
    assert found.shots == 0


def test_the_share_of_correct_answers_survives_tiny_probabilities():
    question = {"labels": [1, 0]}
    assert share_of_correct(question, [(-2000.0, False), (-2000.0, False)]) == {"acc": pytest.approx(0.5)}
    assert share_of_correct(question, [(0.0, True), (-2000.0, False)]) == {"acc": pytest.approx(1.0)}


def test_gsm8k_reads_the_number_after_the_marks(model, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    told = []
    monkeypatch.setattr(HFLM, "_model_generate", lambda self, context, **_: answered(self.tokenizer, context))
    found = benchmark(
        model, "gsm8k", str(folder), limit=3, shots=2, batch_size=3, progress=lambda *counts: told.append(counts)
    )
    assert found.metric == "exact_match,strict-match"
    assert found.value == pytest.approx(1 / 3), "#### 1 alone is right, and in the form that was asked for"
    assert found.metrics["exact_match,flexible-extract"][0] == pytest.approx(2 / 3)
    assert (found.n, found.shots) == (3, 2)
    assert told == [(1, 3), (2, 3), (3, 3)]


def answered(tokenizer, context):
    """What ``generate`` would return for a model that knows 0 + 1, says 1 + 1 in another form, and has 2 + 1 wrong."""
    said = {"0": " #### 1", "1": " so  2 ", "2": " #### 7"}
    asked = [text.rpartition("What is ")[2][0] for text in tokenizer.batch_decode(context)]
    return torch.cat([context, torch.tensor([tokenizer(said[number])["input_ids"] for number in asked])], dim=1)


def test_a_real_generation_runs(model, folder):
    found = benchmark(model, "gsm8k", str(folder), limit=2, shots=1)
    assert (found.n, found.value, found.stderr) == (2, 0.0, 0.0)


def test_examples_never_hold_the_question(model, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked = []

    def note(self, requests, disable_tqdm=False):
        asked.extend(request.args for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(HFLM, "loglikelihood", note)
    benchmark(model, "arc_challenge", str(folder), shots=3)
    assert len(asked) == 6 * 3
    for before, _ in asked:
        *examples, question = before.removesuffix("\nAnswer:").split("\n\n")
        assert len(examples) == 3
        assert question.startswith("Question: which is ")
        assert not any(example.startswith(question) for example in examples)


def test_the_pruned_model_is_measured_and_left_as_it_was(folder):
    model = tiny.model(max_position_embeddings=2048)
    model.network.train()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    every = NeuronSet.of({layer: range(48) for layer in range(3)}, model.widths, model.fingerprint)
    intact = benchmark(model, "truthfulqa_mc2", str(folder))
    with pruned(model, every):
        attacked = benchmark(model, "truthfulqa_mc2", str(folder))
    assert attacked.value != intact.value
    assert benchmark(model, "truthfulqa_mc2", str(folder)) == intact
    assert model.network.training
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_bfloat16_scores_in_float32(model, folder):
    half = tiny.model(max_position_embeddings=2048)
    half.network.to(torch.bfloat16)
    full, found = (benchmark(one, "truthfulqa_mc2", str(folder)) for one in (model, half))
    assert found.value == pytest.approx(full.value, abs=0.1)
    assert len({value for value, _ in found.metrics.values()}) == 1


def test_the_chat_template_is_used_if_asked_for(model, folder):
    plain = benchmark(model, "truthfulqa_mc2", str(folder))
    assert benchmark(model, "truthfulqa_mc2", str(folder), chat_template=True).value != plain.value


def test_local_tasks_ask_as_those_of_the_hub_do():
    from lm_eval import tasks
    from lm_eval.tasks.manager import load_yaml

    for task, known in TASKS.items():
        theirs = load_yaml(Path(tasks.__file__).with_name(known.home) / f"{task}.yaml", resolve_func=False)
        ours = load_yaml(Path(benchmark.__code__.co_filename).with_name("tasks") / f"{task}.yaml", resolve_func=False)
        same = ["output_type", "metric_list", "generation_kwargs", "filter_list"]
        same += ["doc_to_text"] if task.startswith(("truth", "gsm")) else []
        assert [ours.get(key) for key in same] == [theirs.get(key) for key in same], task
    assert theirs["num_fewshot"] == 0


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_said(model, folder, tmp_path):
    with pytest.raises(InputError, match=r"no capability benchmark 'arc_chalenge' .did you mean 'arc_challenge'"):
        benchmark(model, "arc_chalenge")
    with pytest.raises(InputError, match=r"arc_challenge.jsonl does not exist"):
        benchmark(model, "arc_challenge", str(tmp_path))
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(InputError, match="line 1: there is no column 'answer'"):
        benchmark(model, "gsm8k", str(tmp_path))
    with pytest.raises(InputError, match="at least 2 questions, found limit = 1"):
        benchmark(model, "arc_challenge", str(folder), shots=0, limit=1)
    with pytest.raises(InputError, match=r"has 6 questions in .*, too few for 25 examples"):
        benchmark(model, "arc_challenge", str(folder))


def test_without_the_hub_one_sentence_says_what_to_do(model):
    with pytest.raises(
        InputError, match=r"cannot be loaded from the Hub .*name a folder of files with capability.folder"
    ):
        benchmark(model, "truthfulqa_mc1")


def test_without_the_harness_one_sentence_says_what_to_install(model, folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'safeneuron\[eval\]'"):
        benchmark(model, "arc_challenge", str(folder))


def test_a_run_says_so_before_its_first_stage(folder, tmp_path, monkeypatch):
    import sys

    def begun(**changes) -> tuple[str, list[object]]:
        table = {"enabled": "true", "folder": f'"{folder}"', **changes}
        settings = read_config("audit", [f"capability.{key}={value}" for key, value in table.items()])
        watch = tiny_run.Watch()
        with pytest.raises(InputError) as caught:
            tiny_run.execute(settings, tmp_path / "run", watch)
        return str(caught.value), watch.events

    said, events = begun(folder=f'"{tmp_path}"')
    assert "asks the questions in" in said
    assert events == []
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said, events = begun()
    assert "is not installed; install it with: pip install 'safeneuron[eval]'" in said
    assert events == []


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="needs at least one of the tasks"):
        parse_config("[capability]\nenabled = true\ntasks = []", "c.toml")
    with pytest.raises(InputError, match=r"capability.limit = 1 cannot be used"):
        parse_config("[capability]\nlimit = 1", "c.toml")


# -- as a stage of a run ----------------------------------------------------------------------------------------------


def test_a_run_measures_capability_task_by_task(folder, tmp_path):
    config = tiny_run.write_world(tmp_path)
    tiny.model(max_position_embeddings=2048).save(tmp_path / "model")
    text = config.read_text().partition("[variants.dpo]")[0]
    text = text.replace("rounds = 2", "rounds = 0").replace('"static", "adaptive", "iterated"', '"static"')
    config.write_text(text)
    changes = [
        "capability.enabled=true",
        'capability.tasks=["arc_challenge","truthfulqa_mc2"]',
        f'capability.folder="{folder}"',
        "capability.shots=1",
        "capability.limit=4",
        "capability.pruned=true",
        "attack.curve=[]",
        "attack.random=false",
        'attack.sets=["FULL"]',
        'attack.over_refusal="never"',
    ]
    run = tmp_path / "run"
    assert not read_config(config).capability.enabled
    tiny_run.execute(read_config(config, changes), run)
    found = json.loads((run / "report/results.json").read_text())["states"][0]["capability"]
    assert {pruned: sorted(scores) for pruned, scores in found.items()} == {
        "ORI": ["arc_challenge", "truthfulqa_mc2"], "FULL": ["arc_challenge", "truthfulqa_mc2"],
    }  # fmt: skip
    assert found["ORI"]["truthfulqa_mc2"]["value"] != found["FULL"]["truthfulqa_mc2"]["value"]
    assert found["ORI"]["arc_challenge"]["shots"] == 1
    assert "with its safety neurons pruned" in " ".join(explain(run / "T0/capability/FULL/arc_challenge.json"))
    assert "## Capability" in (run / "report/report.md").read_text()
    # A task that is there is not done again; the others are.
    kept, lost = (run / "T0/capability" / name / "truthfulqa_mc2.json" for name in ("ORI", "FULL"))
    first, second = kept.read_bytes(), lost.read_bytes()
    marker = run / "T0/capability/done.json"
    started = json.loads(marker.read_text())
    (run / "T0/capability/started.json").write_text(json.dumps(started))
    marker.unlink()
    lost.unlink()
    kept.write_bytes(first + b" ")
    watch = tiny_run.Watch()
    tiny_run.execute(read_config(config, changes), run, watch)
    assert watch.of("began") == ["T0/capability"]
    assert kept.read_bytes() == first + b" "
    assert lost.read_bytes() == second
