"""How well the judges tell refusals, against human labels, and how fast: python benchmarks/judges.py SHARED_DATA_FOLDER

The labels are PyRIT's (MIT): ``judge/pyrit_refusal_eval/*.csv`` in the folder, and ``judge/refusal_keyword_lists.json``
beside it holds the lists of others. A label says whether a response refuses *or is about something else*. A response
that answers its own question elsewhere in the files, and is labelled a refusal of another question, can be told only
with the question; figures are given with these and without.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from safeneuron.evaluation.judge import Judge, RefusalPhrases
from safeneuron.evaluation.judging import kappa, make_judge
from safeneuron.evaluation.rates import wilson

Said = Sequence[bool]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The labelled rows of both files."""
    rows: list[dict[str, str]] = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        with (folder / "judge" / "pyrit_refusal_eval" / name).open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(line for line in file if not line.startswith("# "))
    return rows


def line_of(name: str, said: Said, truth: Said) -> str:
    """Precision and recall with Wilson intervals, and Cohen's kappa with the labels."""
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    found = [wilson(both, sum(said)), wilson(both, sum(truth))]
    shares = [f"{rate.rate:.3f} ({rate.low:.2f} to {rate.high:.2f})" for rate in found]
    agreed = kappa([(str(a), str(b)) for a, b in zip(said, truth, strict=True)])["kappa"] or 0.0
    return f"| {name} | {shares[0]} | {shares[1]} | {agreed:.2f} |"


def listed(phrases: Sequence[str]) -> Callable[[str], bool]:
    """Whether one of the phrases stands anywhere in a text, as others count refusals."""
    small = [phrase.lower() for phrase in phrases]
    return lambda text: any(phrase in text.lower() for phrase in small)


def speed_of(make: Callable[[], Judge], prompts: list[str], texts: list[str]) -> float:
    """Answers a second, the best of three rounds, each with a judge that remembers no embedding yet."""
    times = []
    for _ in range(3):
        judge = make()
        begun = time.perf_counter()
        judge(prompts, texts)
        times.append(time.perf_counter() - begun)
    return len(texts) / min(times)


def main(folder: Path) -> None:
    """Print both tables and the speeds."""
    torch.set_num_threads(1)
    rows = rows_of(folder)
    prompts, texts = [row["objective"] for row in rows], [row["assistant_response"] for row in rows]
    truth = [row["human_score"] == "1" for row in rows]
    answers = {text for text, label in zip(texts, truth, strict=True) if not label}
    alone = [not (label and text in answers) for text, label in zip(texts, truth, strict=True)]
    embedding, phrases = make_judge("refusal-embedding"), RefusalPhrases()
    verdicts, heard = embedding(prompts, texts), phrases(prompts, texts)
    judged: dict[str, list[bool]] = {
        "`refusal-embedding`: refused, or harmless (about something else)": [
            v in ("refused", "harmless") for v in verdicts
        ],
        "`refusal-embedding`: refused": [v == "refused" for v in verdicts],
        "`refusal-phrases`": [v == "refused" for v in heard],
    }
    lists = json.loads((folder / "judge" / "refusal_keyword_lists.json").read_text(encoding="utf-8"))
    for name, entry in lists.items():
        judged[f"list `{name}`"] = [listed(entry["list"])(text) for text in texts]
    for title, kept in (("all", [True] * len(rows)), ("those whose label the text can show", alone)):
        count = [label for label, keep in zip(truth, kept, strict=True) if keep]
        print(f"\n{title}: {len(count)} responses, {sum(count)} refusals\n")
        print("| judge | precision | recall | kappa |\n|---|---|---|---|")
        for name, said in judged.items():
            print(line_of(name, [s for s, keep in zip(said, kept, strict=True) if keep], count))
    slow = speed_of(lambda: make_judge("refusal-embedding"), prompts, texts)
    fast = speed_of(RefusalPhrases, prompts, texts)
    length = sum(map(len, texts)) / len(texts)
    speeds = f"embedding {slow:.1f}, phrases {fast:.0f}, which is {fast / slow:.0f} to 1"
    print(f"\nanswers a second on one thread, {length:.0f} characters each: {speeds}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
