"""Results from file to values and back: to the byte, also for files of earlier versions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeneuron.errors import InputError
from safeneuron.reporting.results import COLUMNS, Counts, RunResults, results_schema
from safeneuron.runtime.files import write_json
from tests.helpers.sample_results import benign, counts, sample_results, sample_state, typed

# As the first versions wrote it: no differences, part, agreement, categories, capability, quantise or padding.
OLD = """{
 "schema": 1,
 "name": "old",
 "model": "a/model",
 "fingerprint": "3e3356ffac5f1565",
 "seed": 0,
 "judge": "refusal-phrases",
 "max_new_tokens": 32,
 "neurons_total": 144,
 "layers": 2,
 "states": [
  {
   "name": "T1",
   "label": "frei – Sätze",
   "round": 1,
   "variant": "",
   "neurons": {
    "effect_size_threshold": 1.3748588068305219,
    "shift_threshold": 2.0,
    "significant": 0,
    "ES": 1,
    "SAS": 1,
    "FULL": 2,
    "density": 0.013888888888888888,
    "jaccard_with_T0": 0.5,
    "per_layer": {
     "ES": [
      1,
      0
     ],
     "SAS": [
      0,
      1
     ],
     "FULL": [
      1,
      1
     ]
    }
   },
   "align": {
    "freeze": "safety",
    "ablate": false,
    "frozen": 2,
    "frozen_identical": true,
    "frozen_sha256": "5e19",
    "free_change": 0.008595500455651387,
    "steps": 4,
    "pairs": 6
   },
   "training": [
    {
     "step": 1,
     "loss": 0.6931471824645996,
     "accuracy": 0.0,
     "margin": 0.0,
     "grad_norm": 6.040607452392578,
     "learning_rate": 1e-06
    }
   ],
   "attacks": [
    {
     "set": "ORI",
     "knowledge": "none",
     "neurons": 0,
     "perplexity": null,
     "harmful": {
      "n": 3,
      "refused": 1,
      "complied": 1,
      "harmless": 0,
      "incoherent": 0,
      "cannot say": 1,
      "rate": 0.5,
      "low": 0.09453120573423074,
      "high": 0.9054687942657693
     },
     "benign": null
    }
   ],
   "curve": []
  }
 ]
}
"""


def test_a_file_of_an_earlier_version_is_read_and_written_back_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(OLD, encoding="utf-8")
    results = RunResults.load(path)
    (state,) = results.states
    assert (results.part, results.differences, state.capability, state.scores()) == (None, None, None, {})
    assert state.align is not None
    assert state.align.refresh is None
    write_json(path, results.to_json())
    assert path.read_text(encoding="utf-8") == OLD


def test_the_results_of_a_run_are_read_and_written_back_to_the_byte(
    finished_run: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    path = finished_run[0] / "report" / "results.json"
    write_json(tmp_path / "again.json", RunResults.load(path).to_json())
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_what_the_trainer_records_is_all_in_the_results(finished_run: tuple[Path, Path, Any]) -> None:
    """Keys that a record does not know are left out, so the records must know them all."""
    folder = finished_run[0]
    record = json.loads((folder / "report" / "results.json").read_text())
    state = next(state for state in record["states"] if state["name"] == "T1")
    frozen = json.loads((folder / "T1" / "align" / "frozen.json").read_text())
    assert state["align"] == {**frozen, "pairs": 6}
    log = (folder / "T1" / "align" / "train.jsonl").read_text().splitlines()
    assert state["training"] == [json.loads(line) for line in log]
    judged = json.loads((folder / "T1" / "judge" / "ORI" / "harmful.json").read_text())
    assert state["attacks"][0]["harmful"] == judged


def test_what_was_not_run_or_not_judged_is_none() -> None:
    record = sample_results()
    trained = record["states"][1]
    trained["attacks"] = [attack for attack in trained["attacks"] if attack["knowledge"] != "adaptive"]
    trained["attacks"][0] |= {"harmful": counts(5, 0, unknown=5), "benign": None}
    state = typed(record).states[1]
    assert state.attack("FULL", "adaptive") is None
    assert state.success("FULL", "adaptive") is None
    intact = state.attack("ORI", "none")
    assert intact is not None
    assert (intact.success, intact.over_refusal, intact.robustness, intact.incoherent) == (None, None, None, None)
    assert state.over_refusal("ORI", "none") is None


def test_an_attack_has_its_rates_with_their_counts() -> None:
    state = typed(sample_results()).states[1]
    attack = state.attack("FULL", "adaptive")
    assert attack is not None
    assert attack.success is not None
    assert (attack.success.count, attack.success.n) == (15, 47)
    assert attack.over_refusal is not None
    assert (attack.over_refusal.count, attack.over_refusal.n) == (1, 40)
    assert attack.robustness is not None
    assert attack.robustness.count == 48 - 15 - 3 - 1 - 2
    assert attack.incoherent == 3 / 47


def test_on_the_base_model_the_adaptive_attack_is_the_static_one() -> None:
    base, trained = typed(sample_results()).states
    assert base.attack("FULL", "adaptive") is base.attack("FULL", "static") is not None
    assert trained.attack("FULL", "adaptive") is not trained.attack("FULL", "static")


def test_columns_are_in_their_order_and_further_attacks_kind_by_kind() -> None:
    record = sample_results()
    assert typed(record).columns() == [column for column in COLUMNS if column[1] != "iterated"]
    attacks = record["states"][0]["attacks"]
    attacks += [{**attacks[0], "set": name, "knowledge": kind} for name, kind in (("a", "input"), ("b", "rival"))]
    attacks.append({**attacks[0], "set": "FULL", "knowledge": "iterated"})
    assert typed(record).further() == [("b", "rival"), ("a", "input")]
    assert typed(record).columns() == list(COLUMNS)


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    for broken in ({**sample_results(), "schema": 2}, {**sample_results(), "states": []}, {}):
        with pytest.raises(InputError, match="schema"):
            typed(broken)
    path = tmp_path / "results.json"
    path.write_text('{"other": 1}')
    with pytest.raises(InputError, match=r"results\.json"):
        RunResults.load(path)
    with pytest.raises(InputError, match="exist"):
        RunResults.load(tmp_path / "none.json")


def test_a_damaged_record_is_refused_with_its_place() -> None:
    record = sample_results()
    record["states"][0]["attacks"][0]["harmful"]["refused"] = "many"
    with pytest.raises(InputError, match=r"states\.0\.attacks\.0\.harmful\.refused"):
        typed(record)
    with pytest.raises(InputError, match=r"states\.0\.name"):
        typed(sample_results({key: value for key, value in sample_state("T0", 1).items() if key != "name"}))


def test_the_schema_describes_every_key() -> None:
    schema = results_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert schema["description"]
    assert set(schema["required"]) == set(sample_results()) - {"schema"}
    for form in schema["$defs"].values():
        assert form["description"]
        assert all("title" in key or "$ref" in key or "anyOf" in key for key in form["properties"].values())
    assert {"n", "cannot say", "rate"} <= set(schema["$defs"]["Counts"]["required"])
    assert "per_layer" in schema["$defs"]["SelectionResult"]["properties"]
    assert "description" in schema["$defs"]["StateResults"]["properties"]["capability"]


def test_counts_know_every_outcome() -> None:
    harmless = typed(sample_results()).base.attacks[0].benign
    assert isinstance(harmless, Counts)
    assert harmless.count("refused") == benign(40, 1)["refused"] == 1
    assert harmless.share("complied") == 39 / 40
