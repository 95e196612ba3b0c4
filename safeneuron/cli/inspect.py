"""The verbs that look into a finished run, compare neuron sets, or publish a state."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeneuron.cli import console
from safeneuron.cli.console import Bars, print_grid, print_lines, print_table
from safeneuron.errors import InputError
from safeneuron.runtime.patches import without_progress_bars

if TYPE_CHECKING:
    from safeneuron.runs.publication import Publication


def analyse_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run; the others are held beside it in depth and scale.")
    ],
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART",
            help="topics, depth, stability, states, redundancy, methods, neurons or scale; may be repeated. "
            "All if not given.",
        ),
    ] = None,
    state: Annotated[str, typer.Option("--state", help="The state of topics, stability, methods and neurons.")] = "T0",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="STATE", help="Limit depth, states and redundancy to it; may be repeated."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=8, help="Prompts a class in states and redundancy.")] = 64,
    sets: Annotated[int, typer.Option("--sets", min=1, help="Disjoint sets that redundancy looks for.")] = 4,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="FILE",
            help="Stability with these prompts too: a file with columns harmful and harmless, or de for bundled German "
            "ones; may be repeated.",
        ),
    ] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="Print the prompts that excite a neuron.")] = False,
    redo: Annotated[list[str] | None, typer.Option("--redo", metavar="PART", help="Make a part again.")] = None,
) -> None:
    """Look inside: topics, depth, stability, what training changed, redundancy; numbers, tables, figures."""
    without_progress_bars()
    from safeneuron.analysis.analyser import ANALYSIS_PARTS, Analyser
    from safeneuron.analysis.settings import Effort
    from safeneuron.analysis.tables import analysis_tables
    from safeneuron.config.toml import read_config
    from safeneuron.models.loading import quiet
    from safeneuron.runs.run import Run

    quiet()
    runs = [Run.open(folder) for folder in folders]
    (config, opened), *others = [(read_config(str(run.folder / "config.toml"), []), run) for run in runs]
    bars = Bars()
    with opened.locked():
        effort = Effort(prompts=prompts, sets=sets)
        analyser = Analyser(
            config, opened, bars, others=others, state=state, only=only or [], effort=effort, also=also or []
        )
        with bars.bars:
            records = analyser.analyse(parts or ANALYSIS_PARTS, redo or ())
    for title, header, rows in analysis_tables(records, show_text):
        print_table(title, header, rows)
    console.out.print(f"wrote {opened.folder / 'analysis'}")


def publish_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    state: Annotated[str, typer.Option("--state", metavar="STATE", help="T1, T2, ..., or VARIANT-T1.")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; RUN/publish/STATE if not given.")
    ] = None,
    hub: Annotated[
        str, typer.Option("--hub", metavar="OWNER/NAME", help="Push it to this repository on the Hub; needs a token.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let the files go that the repository holds already.")
    ] = False,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="The base model's licence, as the Hub names it.")
    ] = "",
    base: Annotated[
        str, typer.Option("--base", metavar="OWNER/NAME", help="The base model on the Hub, if the run read a folder.")
    ] = "",
) -> None:
    """Write a trained state as a Hugging Face folder with model card, neurons and record; push it if asked to."""
    if (private or replace) and not hub:
        raise InputError("--private and --replace say how to push; give the repository too, with --hub OWNER/NAME")
    from safeneuron.runs.hub import check_repository, push

    if hub:
        check_repository(hub)
    done = _write_publication(run_folder, state, out_folder, hub, licence, base)
    if hub:
        try:
            url = push(done.folder, hub, f"{state}, published by safeneuron", private, replace)
        except InputError as error:
            raise InputError(f"{error}; the folder is written and kept: {done.folder}") from error
        console.out.print(f"pushed to {url}")


def compare_command(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A neuron set (JSON).")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another one of the same model.")],
    scores: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--scores", metavar="FIRST SECOND", help="The rankings behind them, for their correlation."),
    ] = None,
) -> None:
    """How alike two neuron sets are: their overlap, as a whole and by layer, beside what chance gives."""
    from safeneuron.neurons.neuron_set import NeuronSet
    from safeneuron.selection.ranking import Ranking
    from safeneuron.selection.ranking import compare as held_against

    rankings = None if scores is None else (Ranking.load(scores[0]), Ranking.load(scores[1]))
    print_lines(held_against(NeuronSet.load(first), NeuronSet.load(second), rankings).lines())


def show_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a folder or file in one.")],
) -> None:
    """Explain any artefact of a run in words."""
    from safeneuron.runs.show import explain

    print_lines(explain(path, table=not console.out.is_terminal))
    if console.out.is_terminal:
        print_grid(path)


def _write_publication(folder: Path, state: str, target: Path | None, hub: str, licence: str, base: str) -> Publication:
    from safeneuron.runs.run import Run

    opened = Run.open(folder)
    if not console.err.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with opened.locked():
        from safeneuron.runs.publication import publish as write

        bars = Bars()
        began = time.monotonic()
        with bars.bars:
            bars.began(f"{state}/publish")
            done = write(opened, state, target, hub, licence, base, bars.progress)
            bars.ended(f"{state}/publish", time.monotonic() - began, skipped=False)
    for warning in done.warnings:
        bars.warned(warning)
    console.out.print(f"wrote {done.folder}: {len(done.files)} files, {done.size / 1e6:,.1f} MB")
    return done
