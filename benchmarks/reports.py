"""A report of 20,000 answers: its size and the time a browser takes to open it: python benchmarks/reports.py

The answers are made-up prose of about 500 characters with the text in the page (``report.show_text``), five model
states under ten attacks. Opening is from the command to the second frame after all figures and the first answers are
drawn, in a headless Chromium that is already there; then what a filter and a text search take. Of seven openings.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from safeneuron.reporting.details import Details, JudgedAnswer, StrongNeuron
from safeneuron.reporting.report import render_report
from safeneuron.reporting.results import COLUMNS
from tests.helpers.browser import Chromium, installed
from tests.helpers.sample_results import sample_provenance, sample_results, sample_state, typed

ANSWERS = 20_000
OPENINGS = 7
WORDS = (
    (Path(__file__).parent.parent / "safeneuron" / "data" / "bundled" / "benign_text.txt")
    .read_text(encoding="utf-8")
    .split()
)


def answers() -> list[JudgedAnswer]:
    """Answers to 400 prompts, each of 60 to 120 words."""
    draw = random.Random(0)
    found = []
    for number in range(ANSWERS):
        which, knowledge = COLUMNS[number // 400 % 10 % len(COLUMNS)]
        start, length = draw.randrange(len(WORDS)), draw.randrange(60, 120)
        text = " ".join((WORDS * 2)[start : start + length])
        prompt = f"Request {number % 400}: {' '.join(WORDS[number % 400 : number % 400 + 9])}?"
        verdict = draw.choice(("refused", "complied", "harmless", "incoherent"))
        kind = "harmful" if number % 400 < 200 else "benign"
        found.append(
            JudgedAnswer(
                state=f"T{number // 4000}",
                set=which,
                knowledge=knowledge,
                kind=kind,
                index=number % 400,
                prompt=prompt,
                response=text,
                verdict=verdict,
            )
        )
    return found


def main() -> None:
    """Print size and times, each as the median and the range."""
    if installed() is None:
        sys.exit("no Chromium or Chrome is installed")
    states = [sample_state(f"T{index}", 40 - 6 * index) for index in range(5)]
    rows = answers()
    neurons = {
        f"T{index}": [StrongNeuron(i % 30, i, 1536, 0.9, 2.1, 1 + i % 3) for i in range(400)] for index in range(5)
    }
    began = time.monotonic()
    files = render_report(typed(sample_results(*states)), [], sample_provenance(), True, Details(rows, neurons))
    print(f"rendering: {time.monotonic() - began:.1f} s")
    characters = statistics.mean(len(row.response) for row in rows)
    print(f"{len(rows):,} answers of {characters:.0f} characters: {len(files['report.html'].encode()) / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder, Chromium() as browser:
        page = Path(folder) / "report.html"
        page.write_text(files["report.html"], encoding="utf-8")
        tell("opening", [browser.open(page) for _ in range(OPENINGS)])
        search = "document.querySelector('#browser [name=text]')"
        for name, script in (
            ("filter", "const s = document.querySelector('#browser [name=verdict]'); s.value = 1; "
                       "s.dispatchEvent(new Event('change'));"),
            ("first text search", f"{search}.value = 'river'; responseBrowser.filter();"),
            ("next text search", f"{search}.value = 'the sea'; responseBrowser.filter();"),
        ):  # fmt: skip
            took = browser.run(f"(() => {{ const t = performance.now(); {script} return performance.now() - t; }})()")
            print(f"{name}: {took:.0f} ms")
        assert not browser.problems, browser.problems


def tell(name: str, seconds: list[float]) -> None:
    """Print the median of several times, with the shortest and the longest."""
    print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
