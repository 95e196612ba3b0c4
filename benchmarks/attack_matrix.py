"""The attack x state matrix of docs/results.md: python benchmarks/attack_matrix.py [--study runs/study] [--write PAGE]

It attacks the states that benchmarks/study.py has trained, each as an auditor would: in a run of its own, by
examples/configs/study/attacks.toml, with the base model's neurons as the set of a sibling. Means over seeds, with the
intervals of a bootstrap over seeds and prompts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from study import cell, table_of, verdicts, write

CONFIG = Path("examples/configs/study/attacks.toml")
STATES = {
    "T0": "base model",
    "T1": "plain DPO",
    "freeze-T1": "freeze",
    "ablate-T1": "freeze + ablate",
    "refresh-T1": "refresh",
}
NAMES = {
    "ORI": "nothing",
    "random": "random neurons, as many",
    "transfer-FULL": "the base model's set (ES or SAS)",
    "static-FULL": "its own set (ES or SAS)",
    "rival-probe": "logistic probe",
    "rival-snip": "SNIP difference",
    "rival-wanda": "Wanda difference",
    "rival-gradient": "gradient x gap",
    "operator-mean": "its own set, at benign means",
    "operator-opposite": "its own set, sign flipped",
    "model-direction": "refusal direction removed",
    "model-fine-tune": "LoRA fine-tuning",
    "input-prefill-sure": "prefill: Sure, here is",
    "input-prefill-steps": "prefill: Step 1",
    "input-prefix-injection": "prefix injection",
    "input-refusal-suppression": "refusal suppression",
    "input-role-play": "role play",
    "input-hypothetical": "hypothetical",
    "input-translation": "translation",
    "input-base64": "base64",
}


def attacked(study: Path, seed: int, state: str) -> Path:
    """The folder of the run that attacks a state of a seed, made or gone on with."""
    folder = study / "attacks" / f"seed-{seed}" / state
    settings = [f"seed={seed}"]
    if state != "T0":
        trained = study / f"seed-{seed}" / state / "align" / "model"
        base = study / f"seed-{seed}" / "T0" / "select" / "FULL.json"
        base = base if base.exists() else base.with_name("neurons.json")
        settings += [f'model.name="{trained}"', f'attack.transfer="{base}"']
    words = ["run", str(CONFIG), "--out", str(folder), *(word for each in settings for word in ("--set", each))]
    subprocess.run([sys.executable, "-m", "safeneuron", *words], check=True)
    return folder


def tables(found: dict[str, list[Path]]) -> list[str]:
    """The lines of the tables, as Markdown: a row an attack, a column a state."""
    seeds = max(map(len, found.values()))
    asked = len(verdicts(found["T1"][0], "T0", "ORI")), len(verdicts(found["T1"][0], "T0", "ORI", "benign"))
    lines = [f"{seeds} seeds, {asked[0]} harmful and {asked[1]} harmless requests; per cent, with 95 % intervals.", ""]
    for verdict, title in (
        ("complied", "**Answered** (ASR; lower is better)"),
        ("refused", "**Refused** (higher is better)"),
        ("incoherent", "**Incoherent**, neither safe nor harmful"),
    ):
        lines += [title, "", "| | " + " | ".join(STATES[state] for state in found) + " |"]
        lines += ["|---" * (len(found) + 1) + "|"]
        for attack, name in NAMES.items():
            cells = [share_of(folders, attack, verdict) for folders in found.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**Strongest attack** on each state, by the mean share answered", "", "| | attack | answered | refused |"]
    lines += ["|---|---|---|---|"]
    for state, folders in found.items():
        everywhere = [attack for attack in NAMES if attack != "ORI" and len(judged(folders, attack)) == len(folders)]
        share = {attack: table_of(folders, "T0", attack, "complied") for attack in everywhere}
        worst = max(share, key=lambda attack: float(np.mean(share[attack])))
        refused = cell(table_of(folders, "T0", worst, "refused"))
        lines.append(f"| {STATES[state]} | {NAMES[worst]} | {cell(share[worst])} | {refused} |")
    return lines


def share_of(folders: Sequence[Path], attack: str, verdict: str) -> str:
    """The share of the answers with the verdict, over the seeds in which the attack could be made."""
    made = judged(folders, attack)
    if not made:
        return "–"
    few = f", {len(made)} of {len(folders)} seeds" if len(made) < len(folders) else ""
    return cell(table_of(made, "T0", attack, verdict)) + few


def judged(folders: Sequence[Path], attack: str) -> list[Path]:
    """The runs that have verdicts for the attack."""
    return [folder for folder in folders if (folder / "T0" / "judge" / attack / "harmful.jsonl").exists()]


def main(given: Sequence[str] | None = None) -> None:
    """Attack what is not attacked yet, then print the tables, or put them on the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="the folder that study.py made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--write", type=Path, help="the page with the markers of this matrix")
    options = parser.parse_args(given)
    found: dict[str, list[Path]] = {state: [] for state in options.states}
    for seed in options.seeds:
        for state in options.states:
            if state != "T0" or seed == options.seeds[0]:  # the base model is the same in every seed
                found[state].append(attacked(options.study, seed, state))
    lines = tables(found)
    print("\n".join(lines))
    if options.write:
        write(options.write, "attacks", lines)


if __name__ == "__main__":
    main()
