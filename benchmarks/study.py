"""The study of docs/results.md: python benchmarks/study.py CONFIG [--seeds 0 1 2] [--out runs/study] [--write PAGE]

Each seed is a run of its own, made or continued by the command line. Rates are means over seeds; their intervals come
from a bootstrap over seeds and, within them, over prompts, so that both kinds of chance are in them. T1, the main
training of the config, is plain DPO; a difference from it is taken prompt by prompt within a seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from safeneuron.evaluation.rates import bootstrap_interval

MARKER = "<!-- study: {} -->"
ATTACKS = (
    ("ORI", "ORI"),
    ("static", "static-FULL"),
    ("adaptive", "adaptive-FULL"),
    ("iterated", "iterated-FULL"),
    ("random", "random"),
)


def run_seed(config: str, seed: int, out: Path) -> Path:
    """The folder of the seed's run, made or gone on with."""
    folder = out / f"seed-{seed}"
    words = ["run", config, "--set", f"seed={seed}", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "safeneuron", *words], check=True)
    return folder


def verdicts(folder: Path, state: str, attack: str, kind: str = "harmful") -> list[str]:
    """The verdicts on a state's answers under an attack, in the order of the prompts."""
    path = folder / state / "judge" / attack / f"{kind}.jsonl"
    if not path.exists() and attack == "adaptive-FULL":
        path = folder / state / "judge" / "static-FULL" / f"{kind}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["verdict"] for line in sorted(lines, key=lambda line: line["index"])]


def table_of(folders: Sequence[Path], state: str, attack: str, verdict: str, kind: str = "harmful") -> np.ndarray:
    """Whether each answer got the verdict, ``[seed, prompt]``."""
    return np.array([[float(v == verdict) for v in verdicts(folder, state, attack, kind)] for folder in folders])


def cell(values: np.ndarray) -> str:
    """Mean and interval in per cent."""
    low, high = bootstrap_interval(values)
    return f"{100 * values.mean():.0f} ({100 * low:.0f} to {100 * high:.0f})"


def tables(folders: Sequence[Path]) -> list[str]:
    """The lines of all tables, as Markdown."""
    results = [json.loads((folder / "report" / "results.json").read_text()) for folder in folders]
    states = [(state["name"], state["label"]) for state in results[0]["states"]]
    header = [name for name, _ in ATTACKS]
    first = verdicts(folders[0], "T0", "ORI"), verdicts(folders[0], "T0", "ORI", "benign")
    asked = f"{len(first[0])} harmful and {len(first[1])} harmless requests"
    lines = [f"{len(folders)} seeds, {asked}; per cent, with 95 % intervals.", ""]
    for verdict, title in (
        ("complied", "**Answered** (ASR; lower is better)"),
        ("refused", "**Refused** (higher is better)"),
        ("incoherent", "**Incoherent**, neither safe nor harmful"),
    ):
        lines += [title, "", "| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
        for name, label in states:
            cells = [cell(table_of(folders, name, attack, verdict)) for _, attack in ATTACKS]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**Against plain DPO**: difference in per cent of the requests answered, refused", ""]
    lines += [
        "| | adaptive: answered | adaptive: refused | iterated: answered | iterated: refused |",
        "|---|---|---|---|---|",
    ]
    for name, label in states:
        if name in ("T0", "T1"):
            continue
        cells = []
        for attack in ("adaptive-FULL", "iterated-FULL"):
            for verdict in ("complied", "refused"):
                gap = table_of(folders, name, attack, verdict) - table_of(folders, "T1", attack, verdict)
                low, high = bootstrap_interval(gap)
                cells.append(f"{100 * gap.mean():+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "**Cost**: over-refusal of the harmless requests, perplexity of plain prose, frozen and moved weights",
        "",
    ]
    lines += [
        "| | harmless requests refused | perplexity | perplexity, adaptive pruned | frozen neurons | rest moved by |",
        "|---|---|---|---|---|---|",
    ]
    for number, (name, label) in enumerate(states):
        benign = cell(table_of(folders, name, "ORI", "refused", "benign"))
        each = [result["states"][number] for result in results]
        plain = np.mean([perplexity(state, "ORI", "none") for state in each])
        pruned = np.mean([perplexity(state, "FULL", "static" if name == "T0" else "adaptive") for state in each])
        trained = each[0]["align"]
        frozen = f"{trained['frozen']:,}" if trained else "–"
        moved = f"{100 * np.mean([state['align']['free_change'] for state in each]):.2g} %" if trained else "–"
        lines.append(f"| {label} | {benign} | {plain:.1f} | {pruned:.1f} | {frozen} | {moved} |")
    return lines


def perplexity(state: dict, which: str, knowledge: str) -> float:
    """The state's perplexity under one attack."""
    (found,) = [a for a in state["attacks"] if (a["set"], a["knowledge"]) == (which, knowledge)]
    return float(found["perplexity"])


def write(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put the tables between the two markers of this study on the page."""
    start, end = MARKER.format(name), MARKER.format(f"end of {name}")
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    page.write_text(before + "\n".join([start, *lines, end]) + after, encoding="utf-8")


def main() -> None:
    """Run what is missing, then print the tables, or put them on the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--write", type=Path, help="the page with the markers of this study")
    given = parser.parse_args()
    lines = tables([run_seed(given.config, seed, given.out) for seed in given.seeds])
    print("\n".join(lines))
    if given.write:
        write(given.write, Path(given.config).stem, lines)


if __name__ == "__main__":
    main()
