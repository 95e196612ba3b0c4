"""TRL's trainer as this project extends it: batches of like length, their padding, the reference's order."""

import json
import re
from pathlib import Path

import pytest
import torch

from safeneuron.data.types import Pair
from safeneuron.training.dpo import PreferenceTrainer, dataset_of, padded_lengths
from safeneuron.training.settings import TrainingSettings, Watch, arguments_of, last_checkpoint, training_log
from tests import rarely
from tests.helpers import tiny

PAIRS = [
    Pair(
        ({"role": "user", "content": "q" * (1 + number * 7 % 23)},),
        "no" * (1 + number % 5),
        "yes" * (1 + number * 5 % 9),
    )
    for number in range(22)
]
SETTINGS = TrainingSettings(
    epochs=3, batch_size=4, micro_batch_size=2, max_length=80, precision="float32", save_every=2
)


class Recorder(PreferenceTrainer):
    """Remembers the rows of every micro-batch."""

    seen: list[torch.Tensor]
    stop_at = -1

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(inputs["input_ids"])
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(folder: Path, settings: TrainingSettings = SETTINGS, pairs: list[Pair] = PAIRS) -> Recorder:
    made = Recorder(
        model=tiny.network(),
        args=arguments_of(settings, len(pairs), torch.device("cpu"), folder, save=True),
        train_dataset=dataset_of(pairs),
        processing_class=tiny.tokenizer(),
        callbacks=[Watch(folder, None)],
    )
    made.seen = []
    return made


def text_of(row: torch.Tensor) -> str:
    """What stands in a row, without its end and padding."""
    return re.sub(r"(<\|end\|>)+$", "", tiny.tokenizer().decode(row))


def conversations(batch: torch.Tensor) -> list[str]:
    """The texts of the chosen rows; every pair has another prompt."""
    return [text_of(row) for row in batch[: len(batch) // 2]]


def epochs_of(seen: list[torch.Tensor], each: int = 11) -> list[list[list[str]]]:
    return [[conversations(batch) for batch in seen[start : start + each]] for start in range(0, len(seen), each)]


def test_like_lengths_share_a_micro_batch_and_every_epoch_has_another_order(tmp_path):
    made = trainer(tmp_path)
    made.train()
    first, second, part = epochs_of(made.seen)
    for epoch in (first, second):
        assert len({text for batch in epoch for text in batch}) == len(PAIRS)
    assert first != second
    assert part not in (first[: len(part)], second[: len(part)])
    padding = [record["padding"] for record in made.state.log_history if "loss" in record]
    plain = trainer(tmp_path / "plain", TrainingSettings(**{**vars(SETTINGS), "bucketing": False}))
    plain.train()
    as_it_comes = [record["padding"] for record in plain.state.log_history if "loss" in record]
    assert sum(padding) / len(padding) < 0.75 * sum(as_it_comes) / len(as_it_comes)


def test_logged_padding_is_that_of_the_batches(tmp_path):
    made = trainer(tmp_path)
    made.train()
    whole = {}
    for pair in PAIRS:
        before = tiny.tokenizer().apply_chat_template(list(pair.prompt), add_generation_prompt=True, tokenize=False)
        for answer in (pair.chosen, pair.rejected):
            whole[before + answer] = len(tiny.tokenizer()(before + answer + "<|end|>")["input_ids"])
    rows = [row for batch in made.seen[:2] for row in batch]
    filled = sum(whole[text_of(row)] for row in rows)
    expected = 1 - filled / sum(len(row) for row in rows)
    assert made.state.log_history[0]["padding"] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [rarely(5), 16, rarely(24)])
def test_resumed_training_sees_what_it_would_have_seen(stop, tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    broken = trainer(tmp_path / "broken")
    broken.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "broken"))
    assert len(resumed.seen) < len(whole.seen)
    for mine, theirs in zip(resumed.seen, whole.seen[-len(resumed.seen) :], strict=True):
        assert torch.equal(mine, theirs)
    assert training_log(resumed.state.log_history) == training_log(whole.state.log_history)


def test_the_reference_goes_from_long_to_short_pairs_and_belongs_to_its_pair(tmp_path):
    made = trainer(tmp_path)
    lengths = padded_lengths(made.train_dataset, 80)
    assert lengths == sorted(lengths, reverse=True)
    plain = trainer(tmp_path / "plain", TrainingSettings(**{**vars(SETTINGS), "bucketing": False}))
    assert padded_lengths(plain.train_dataset, 40) != lengths

    def references(one):
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {
            json.dumps([row[key] for key in keys]): (row["ref_chosen_logps"], row["ref_rejected_logps"])
            for row in one.train_dataset
        }

    mine, theirs = references(made), references(plain)
    assert mine.keys() == theirs.keys()
    assert len(mine) == len(PAIRS)
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], rel=1e-5)


def test_lengths_are_those_of_the_collator(tmp_path):
    made = trainer(tmp_path)
    rows = [made.train_dataset[place] for place in range(len(PAIRS))]
    for limit in (None, 30):
        made.data_collator.max_length = limit
        assert padded_lengths(made.train_dataset, limit) == [
            made.data_collator([row])["input_ids"].shape[1] for row in rows
        ]
