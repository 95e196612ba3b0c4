"""The verbs that make a run or one of its stages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safeneuron.cli import console
from safeneuron.cli.console import Bars, Changes, Out, Redo, RunFolder, print_grid, print_lines, toml_string
from safeneuron.errors import InputError
from safeneuron.runtime import distributed
from safeneuron.runtime.patches import without_progress_bars

if TYPE_CHECKING:
    from safeneuron.config.schema import Config
    from safeneuron.runs.run import Run


def run_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a bundled config.")],
    changes: Changes = None,
    out_folder: Out = None,
    redo: Redo = None,
) -> None:
    """Do all stages over T0, T1, ...; whatever is finished is skipped, whatever was interrupted goes on."""
    from safeneuron.config.toml import read_config

    _execute(read_config(config, changes or []), out_folder, redo or [])


def audit_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    changes: Changes = None,
    out_folder: Out = None,
    redo: Redo = None,
) -> None:
    """How brittle is this model's safety? Measure, prune and report, without training."""
    from safeneuron.config.toml import read_config

    name = "audit-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in model.strip("/").split("/")[-1])
    settings = [f"model.name={toml_string(model)}", f"name={toml_string(name)}", *(changes or [])]
    _execute(read_config("audit", settings), out_folder, redo or [])


def measure_command(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Activation statistics of every state that exists."""
    _one_verb("measure", run_folder, changes, out_folder, redo)


def select_command(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Scores and safety neurons of every state that has been measured."""
    _one_verb("select", run_folder, changes, out_folder, redo)


def align_command(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Make the preference pairs, and train every state whose neurons to freeze are known."""
    _one_verb("align", run_folder, changes, out_folder, redo)


def attack_command(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Pruning attacks on every state whose neurons are known, and verdicts on the answers."""
    _one_verb("attack", run_folder, changes, out_folder, redo)


def report_command(
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of the run, or a config; several runs to compare.")
    ],
    changes: Changes = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; of several, of their comparison.")
    ] = None,
    redo: Redo = None,
) -> None:
    """Tables and figures, once all states have been attacked; of several finished runs, all of them side by side."""
    if len(run_folders) == 1:
        _one_verb("report", run_folders[0], changes, out_folder, redo)
        return
    if changes or redo:
        raise InputError("--set and --redo belong to one run; give them with one run, and compare afterwards")
    from safeneuron.runs.compare import write_comparison

    target = out_folder or run_folders[0].resolve().parent / "comparison"
    files = write_comparison(run_folders, target)
    print_lines([f"wrote {path}" for path in files if path.parent == target])


def _one_verb(
    verb: str, folder: Path, changes: list[str] | None, out_folder: Path | None, redo: list[str] | None
) -> None:
    from safeneuron.config.toml import read_config
    from safeneuron.runs.run import Run

    if folder.is_dir():
        opened = Run.open(folder)
        settings = read_config(opened.folder / "config.toml", changes or [])
        _execute(settings, out_folder or folder, redo or [], verb)
    else:
        _execute(read_config(str(folder), changes or []), out_folder, redo or [], verb)


def _execute(settings: Config, folder: Path | None, names: list[str], verb: str = "") -> None:
    from safeneuron.runs.run import Run

    opened = Run.create(folder or Path("runs") / settings.name)
    with opened.locked():
        # The libraries' own progress bars would fight with ours.
        without_progress_bars()
        from safeneuron.models.loading import quiet
        from safeneuron.runs.pipeline import Pipeline, prepare

        quiet()

        bars = Bars()
        for name in distributed.from_main(lambda: prepare(settings, opened, bars, names)):
            console.out.print(f"{name}: deleted, will be made again")
        pipeline = Pipeline(settings, opened, bars, verb)
        with bars.bars:
            pipeline.execute()
        pipeline.require_work()
    if distributed.is_main():
        _tell(opened)


def _tell(opened: Run) -> None:
    """Name the files of a finished run and print the opening lines of its result table."""
    results = opened.folder / "report" / "results.json"
    if not (opened.folder / "report" / "done.json").exists():
        command = shlex.join(["safeneuron", "run", str(opened.folder / "config.toml"), "--out", str(opened.folder)])
        print_lines(["", f"{opened.folder} is not complete yet; continue with: {command}"])
        return
    from safeneuron.reporting.results import RunResults
    from safeneuron.reporting.terminal import result_lines

    files = [opened.folder / "report" / name for name in ("report.html", "report.md", "results.json")]
    if console.out.is_terminal:
        print_grid(opened.folder)
    else:
        print_lines(["", *result_lines(RunResults.load(results))])
    print_lines(["", *(f"wrote {path}" for path in files)])
