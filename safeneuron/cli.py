"""The command line: verbs, progress bars, and errors as one sentence. Heavy imports happen inside the verbs."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperGroup

from safeneuron import ranks
from safeneuron.errors import InputError

if TYPE_CHECKING:
    from safeneuron.config import Config
    from safeneuron.publishing import Publication
    from safeneuron.runs import Run

# Texts and paths are printed as they are: none of their characters is markup. Of many processes the first one speaks.
out = Console(
    highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not ranks.is_main(),
    force_terminal=None if ranks.is_main() else False,
)  # fmt: skip
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the user can mend into one sentence; errors of the program keep their traceback."""
    try:
        yield
        ranks.leave()
    except InputError as error:
        _end(2, Text.assemble(("error: ", "red"), str(error)))
    except KeyboardInterrupt:
        _end(130, Text("stopped; what is finished is kept, and the same command goes on from here"))
    except (typer.Exit, typer.Abort):
        raise
    except typer.TyperException as error:
        # Every process was given the same words; what is wrong with them is said once.
        if not ranks.is_main():
            sys.exit(error.exit_code)
        raise
    except Exception as error:
        from safeneuron.runs import FREE_SPACE, disk_full

        if disk_full(error):
            _end(2, Text.assemble(("error: ", "red"), f"the disk is full ({error}); {FREE_SPACE}"))
        code = ranks.first_to_fail(1)
        if code is not None:
            sys.exit(code)
        raise


def _end(code: int, sentence: Text) -> NoReturn:
    """End the program; of many processes the one that fails first says why, and the others end as it does."""
    first = ranks.first_to_fail(code)
    if first is None:
        err.print(sentence)
    sys.exit(code if first is None else first)


class Verbs(TyperGroup):
    """The verbs, each explaining its errors; typer would end the program at Ctrl-C without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was asked for."""
        with _explained():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Verbs,
    help="Find a model's safety neurons, train safety into the rest of the network, and prove it by pruning attacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change one setting; may be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if not given.")]
Redo = Annotated[
    list[str] | None,
    typer.Option("--redo", metavar="STAGE", help="Make a stage (T1/attack, or attack for all) and what follows again."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, or a config to start one from.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a bundled config.")],
    changes: Changes = None,
    out_folder: Out = None,
    redo: Redo = None,
) -> None:
    """Do all stages over T0, T1, ...; whatever is finished is skipped, whatever was interrupted goes on."""
    from safeneuron.config import read_config

    _execute(read_config(config, changes or []), out_folder, redo or [])


@app.command()
def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    changes: Changes = None,
    out_folder: Out = None,
    redo: Redo = None,
) -> None:
    """How brittle is this model's safety? Measure, prune and report, without training."""
    from safeneuron.config import read_config

    name = "audit-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in model.strip("/").split("/")[-1])
    settings = [f"model.name={_quoted(model)}", f"name={_quoted(name)}", *(changes or [])]
    _execute(read_config("audit", settings), out_folder, redo or [])


@app.command()
def measure(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Activation statistics of every state that exists."""
    _one_verb("measure", run_folder, changes, out_folder, redo)


@app.command()
def select(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Scores and safety neurons of every state that has been measured."""
    _one_verb("select", run_folder, changes, out_folder, redo)


@app.command()
def align(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Make the preference pairs, and train every state whose neurons to freeze are known."""
    _one_verb("align", run_folder, changes, out_folder, redo)


@app.command()
def attack(run_folder: RunFolder, changes: Changes = None, out_folder: Out = None, redo: Redo = None) -> None:
    """Pruning attacks on every state whose neurons are known, and verdicts on the answers."""
    _one_verb("attack", run_folder, changes, out_folder, redo)


@app.command()
def report(
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
    from safeneuron.gathering import write_comparison

    target = out_folder or run_folders[0].resolve().parent / "comparison"
    files = write_comparison(run_folders, target)
    _print_lines([f"wrote {path}" for path in files if path.parent == target])


@app.command()
def analyse(
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
    os.environ["TQDM_DISABLE"] = "1"
    from safeneuron.analysing import PARTS, Analyser
    from safeneuron.config import read_config
    from safeneuron.inspecting import Effort
    from safeneuron.runs import Run
    from safeneuron.telling import told

    (config, opened), *others = [(read_config(str(folder / "config.toml"), []), Run.open(folder)) for folder in folders]
    bars = Bars()
    with opened.locked():
        effort = Effort(prompts=prompts, sets=sets)
        analyser = Analyser(config, opened, bars, others, state, only or [], effort, also or [])
        with bars.bars:
            found = analyser.analyse(parts or PARTS, redo or ())
    for title, header, rows in told(found, show_text):
        _print_table(title, header, rows)
    out.print(f"wrote {opened.folder / 'analysis'}")


@app.command()
def publish(
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
    from safeneuron.pushing import check_repository, push

    if hub:
        check_repository(hub)
    done = _write_publication(run_folder, state, out_folder, hub, licence, base)
    if hub:
        try:
            url = push(done.folder, hub, f"{state}, published by safeneuron", private, replace)
        except InputError as error:
            raise InputError(f"{error}; the folder is written and kept: {done.folder}") from error
        out.print(f"pushed to {url}")


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    neurons: Annotated[
        Path, typer.Argument(metavar="NEURONS", help="A neuron set, such as RUN/T0/select/neurons.json.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    factor: Annotated[float, typer.Option("--factor", help="What the neurons are multiplied by; 0 prunes them.")] = 0.0,
    value: Annotated[
        float | None,
        typer.Option("--value", help="Pin them to this instead; only for models whose FFN output has a bias."),
    ] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="The neurons are another model's of the same shape, and that is meant.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Write a model with neurons pruned as a Hugging Face folder, in the precision in which it is stored."""
    from safeneuron.edits import Edit
    from safeneuron.models import load
    from safeneuron.neurons import NeuronSet
    from safeneuron.persisting import write_pruned

    chosen = NeuronSet.load(neurons)
    loaded = load(model, dtype="stored", device=device)
    if transfer:
        chosen = chosen.transferred(loaded.fingerprint, loaded.widths)
    edit = Edit.scale(chosen, factor) if value is None else Edit.clamp(chosen, value)
    write_pruned(loaded, edit, out_folder)
    out.print(f"wrote {out_folder}: {loaded.name} with {edit.name} at {chosen}")


@app.command()
def draw(
    source: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="A file of prompts, hub:owner/name, or a benchmark.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    split: Annotated[str, typer.Option("--split", help="Split of bundled prompts or of a Hub dataset.")] = "",
    column: Annotated[str, typer.Option("--column", help="Column with the prompt; found if not given.")] = "",
    count: Annotated[int | None, typer.Option("--count", help="Only the first so many.", min=1)] = None,
    said: Annotated[
        str, typer.Option("--said", help="What is written beside the image; the paper's words if not given.")
    ] = "",
    size: Annotated[int, typer.Option("--size", help="Width and height in pixels.", min=64)] = 760,
    font: Annotated[str, typer.Option("--font", help="A .ttf or .otf file; Pillow's own has Latin letters only.")] = "",
) -> None:
    """Draw each prompt as an image, for vision-language models: FOLDER/prompts.jsonl names them."""
    from safeneuron.data import read_prompts
    from safeneuron.drawing import drawn
    from safeneuron.runs import write_lines

    prompts = drawn(read_prompts(source, split=split, column=column, count=count), said, size, font)
    write_lines(out_folder / "prompts.jsonl", (prompt.to_record(out_folder) for prompt in prompts))
    out.print(
        f"wrote {out_folder / 'prompts.jsonl'}: {len(prompts)} prompts, their texts drawn in {out_folder / 'images'}"
    )


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A neuron set (JSON).")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another one of the same model.")],
    scores: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--scores", metavar="FIRST SECOND", help="The rankings behind them, for their correlation."),
    ] = None,
) -> None:
    """How alike two neuron sets are: their overlap, as a whole and by layer, beside what chance gives."""
    from safeneuron.comparing import compare as held_against
    from safeneuron.neurons import NeuronSet
    from safeneuron.rankings import Ranking

    rankings = None if scores is None else (Ranking.load(scores[0]), Ranking.load(scores[1]))
    _print_lines(held_against(NeuronSet.load(first), NeuronSet.load(second), rankings).lines())


@app.command()
def config(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a bundled config.")] = "default") -> None:
    """Print a complete config, every key with its meaning."""
    from safeneuron.config import presets, read_config, to_toml
    from safeneuron.errors import nearest

    if name not in presets():
        known = ", ".join(presets())
        raise InputError(f"there is no bundled config {name!r}{nearest(name, presets())}; there are {known}")
    _print_lines([to_toml(read_config(name)).rstrip("\n")])


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    weights: Annotated[
        bool, typer.Option("--weights/--config-only", help="Load it and prove it, or read its config alone?")
    ] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Where a model's neurons lie and what each owns, proved on its weights, and what cannot be done with it."""
    from rich.table import Table

    from safeneuron.doctor import examine

    found = examine(model, weights=weights, device=device)
    known = f", fingerprint {found.fingerprint}" if found.fingerprint else ""
    out.print(f"{found.name} ({found.kind}): {found.neurons:,} neurons{known}")
    table = Table("layers", "FFN", "neurons", "form")
    table.add_column("neuron j owns", no_wrap=True)
    for row in found.rows:
        table.add_row(row.layers, row.ffn, row.neurons, row.form, Text("\n".join(row.owns)))
    out.print(table)
    _print_lines(found.remarks)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a bundled config.")],
    changes: Changes = None,
    device_memory: Annotated[
        str,
        typer.Option("--device-memory", help="Memory of each GPU, such as 80GB; that of this machine if not given."),
    ] = "",
    devices: Annotated[int, typer.Option("--devices", min=1, help="GPUs that train together.")] = 1,
    sharded: Annotated[
        bool,
        typer.Option("--sharded/--replicated", help="Do they share what is trained (FSDP2), or each hold it (DDP)?"),
    ] = True,
    device_flops: Annotated[
        float,
        typer.Option("--device-flops", min=0, help="Operations a second of each GPU, such as 400e12; else measured."),
    ] = 0.0,
    device_bandwidth: Annotated[
        str,
        typer.Option("--device-bandwidth", help="Bytes a second that each GPU's memory gives, such as 3.3TB."),
    ] = "",
) -> None:
    """What each stage will need in memory and time, and whether it fits; reads the model's config, not its weights."""
    from safeneuron.config import read_config
    from safeneuron.durations import clock_for, table_of_times
    from safeneuron.foreseeing import Paper, device_asked, table_of_needs

    settings = read_config(config, changes or [])
    device = device_asked(settings, device_memory, devices, sharded)
    paper = Paper.of(settings, words=True)
    _print_lines([*table_of_needs(settings, device, paper), ""])
    clock = clock_for(settings, paper, device, device_flops, device_bandwidth, here=not device_memory)
    if clock is None:
        _print_lines(["time: give --device-flops and --device-bandwidth of a device that is not here"])
    else:
        _print_lines(table_of_times(settings, clock))


@app.command()
def redteam(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for what it writes; the same one goes on.")],
    neurons: Annotated[
        Path | None,
        typer.Option("--neurons", metavar="FILE", help="Prune these, such as RUN/T0/select/neurons.json."),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option("--prompts", metavar="SOURCE", help="Harmful requests to answer: a file, hub:owner/name."),
    ] = "twins:unsafe",
    per_seed: Annotated[int, typer.Option("-n", min=1, help="Samples for each category and each request.")] = 4,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Answer the first so many requests; all if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of a sample.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the draws, above 0.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens with this share.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples generated together.")] = 32,
    judge: Annotated[str, typer.Option("--judge", help="Who tells refusals from answers.")] = "refusal-embedding",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")] = "auto",
    redo: Annotated[
        str, typer.Option("--redo", metavar="STAGE", help="Make prompts, answers or yield, and what follows, again.")
    ] = "",
) -> None:
    """Use a model, pruned or not, as a red-team generator, and count how much of what it writes is of use."""
    os.environ["TQDM_DISABLE"] = "1"
    from safeneuron.data import read_prompts
    from safeneuron.judges import make_judge
    from safeneuron.models import load
    from safeneuron.neurons import NeuronSet
    from safeneuron.redteam import RedTeam, prepare, red_team, table
    from safeneuron.runs import Run

    settings = RedTeam(per_seed, seed, temperature, top_p, max_new_tokens, batch_size)
    opened = Run.create(out_folder)
    with opened.locked():
        prepare(opened, redo)
        requests = read_prompts(prompts, split="test" if prompts == "twins:unsafe" else "", count=count)
        chosen = NeuronSet.load(neurons) if neurons is not None else None
        bars, began = Bars(), time.monotonic()
        with bars.bars:
            bars.began("redteam")
            results = red_team(
                load(model, dtype), chosen, requests, make_judge(judge), out_folder, settings, bars.progress
            )
            bars.ended("redteam", time.monotonic() - began, skipped=False)
    _print_lines(["", *table(results), "", f"wrote {out_folder}, which holds harmful text: do not publish it"])


@app.command()
def show(path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a folder or file in one.")]) -> None:
    """Explain any artefact of a run in words."""
    from safeneuron.explaining import explain

    _print_lines(explain(path, table=not out.is_terminal))
    if out.is_terminal:
        _print_grid(path)


@app.command()
def judge(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl or .csv file of prompts and responses.")],
    names: Annotated[
        list[str] | None, typer.Option("--judge", metavar="NAME", help="Who judges; may be repeated.")
    ] = None,
    rule: Annotated[
        str, typer.Option("--rule", help="Of several judges: majority, all or any must say that it complies.")
    ] = "majority",
    target: Annotated[Path | None, typer.Option("--out", help="File to write; FILE.judged.jsonl if not given.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", metavar="COLUMN", help="Column of the prompts.")] = "",
    response: Annotated[str, typer.Option("--response", metavar="COLUMN", help="Column of the responses.")] = "",
    changes: Changes = None,
) -> None:
    """Add verdicts to any file of prompts and responses; the settings of judges are --set judge.KEY=VALUE."""
    from safeneuron.config import read_config
    from safeneuron.runs import write_lines

    wanted = [f"judge.name=[{', '.join(_quoted(name) for name in names)}]"] if names else []
    table = read_config("default", [*wanted, f"judge.rule={_quoted(rule)}", *(changes or [])]).judge
    written = target or path.with_name(f"{path.stem}.judged.jsonl")
    if written.exists() and written.resolve() == path.resolve():
        raise InputError(f"{written} is the file to be judged, and would be lost; give another one with --out")
    from safeneuron.judging import judged, read_answers, told
    from safeneuron.sources import judges_of

    rows, answers = read_answers(path, prompt, response)
    (found,) = judged(judges_of(table), table.rule, [answers])
    write_lines(written, ({**row, **record} for row, record in zip(rows, found.records(), strict=True)))
    _print_lines([*told(found, table.label), f"wrote {written}"])


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from safeneuron import __version__

        out.print(f"safeneuron {__version__}")
        raise typer.Exit


class Bars:
    """Progress bars with time estimates on a terminal; one line a stage where the output is not a terminal."""

    def __init__(self) -> None:
        # The time left is estimated over the last hour, since one step of a large model takes minutes.
        self.bars = Progress(
            TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=out, transient=True, speed_estimate_period=3600,
        )  # fmt: skip
        self.task: TaskID | None = None

    def began(self, stage: str) -> None:
        """Show a bar for the stage, without a length until its first progress."""
        if out.is_terminal:
            self.task = self.bars.add_task(stage, total=None)
        else:
            out.print(f"{stage} ...")

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self.task is not None:
            self.bars.update(self.task, completed=done, total=total)

    def ended(self, stage: str, seconds: float, skipped: bool) -> None:
        """Leave one line of the stage."""
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        if skipped:
            out.print(f"{stage}: done before, skipped", style="dim")
        else:
            out.print(f"{stage}: done in {seconds:.1f} s")

    def noted(self, text: str) -> None:
        """Print a line."""
        out.print(text)

    def warned(self, text: str) -> None:
        """Print a warning."""
        if ranks.is_main():
            err.print(Text.assemble(("warning: ", "yellow"), text))


def main() -> None:
    """The program ``safeneuron``: exit code 2 for a mistake of the user, 130 for Ctrl-C."""
    if ranks.world() > 1:
        # A launcher ends the processes with this signal, when it is stopped itself or when one of them has failed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    finally:
        # An output that could not be written has been explained; what is left of it would fail again at exit.
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = io.StringIO()


def _one_verb(
    verb: str, folder: Path, changes: list[str] | None, out_folder: Path | None, redo: list[str] | None
) -> None:
    from safeneuron.config import read_config
    from safeneuron.runs import Run

    if folder.is_dir():
        opened = Run.open(folder)
        settings = read_config(opened.folder / "config.toml", changes or [])
        _execute(settings, out_folder or folder, redo or [], verb)
    else:
        _execute(read_config(str(folder), changes or []), out_folder, redo or [], verb)


def _execute(settings: Config, folder: Path | None, names: list[str], verb: str = "") -> None:
    from safeneuron.runs import Run

    opened = Run.create(folder or Path("runs") / settings.name)
    with opened.locked():
        # The libraries' own progress bars would fight with ours; they read this when they are imported.
        os.environ["TQDM_DISABLE"] = "1"
        from safeneuron.pipeline import Pipeline
        from safeneuron.preparing import prepare

        bars = Bars()
        for name in ranks.from_main(lambda: prepare(settings, opened, bars, names)):
            out.print(f"{name}: deleted, will be made again")
        pipeline = Pipeline(settings, opened, bars, verb)
        with bars.bars:
            pipeline.execute()
        pipeline.require_work()
    if ranks.is_main():
        _tell(opened)


def _write_publication(folder: Path, state: str, target: Path | None, hub: str, licence: str, base: str) -> Publication:
    from safeneuron.runs import Run

    opened = Run.open(folder)
    if not err.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with opened.locked():
        from safeneuron.publishing import publish as write

        bars = Bars()
        began = time.monotonic()
        with bars.bars:
            bars.began(f"{state}/publish")
            done = write(opened, state, target, hub, licence, base, bars.progress)
            bars.ended(f"{state}/publish", time.monotonic() - began, skipped=False)
    for warning in done.warnings:
        bars.warned(warning)
    out.print(f"wrote {done.folder}: {len(done.files)} files, {done.size / 1e6:,.1f} MB")
    return done


def _tell(opened: Run) -> None:
    """Name the files of a finished run and print the opening lines of its result table."""
    from safeneuron.runs import read_json

    results = opened.folder / "report" / "results.json"
    if not (opened.folder / "report" / "done.json").exists():
        command = shlex.join(["safeneuron", "run", str(opened.folder / "config.toml"), "--out", str(opened.folder)])
        _print_lines(["", f"{opened.folder} is not complete yet; continue with: {command}"])
        return
    from safeneuron.scoreboard import result_table

    files = [opened.folder / "report" / name for name in ("report.html", "report.md", "results.json")]
    if out.is_terminal:
        _print_grid(opened.folder)
    else:
        _print_lines(["", *result_table(read_json(results))])
    _print_lines(["", *(f"wrote {path}" for path in files)])


def _print_grid(path: Path) -> None:
    """A run's result table, drawn to the width of the terminal."""
    from rich.table import Table

    from safeneuron.explaining import grid

    shown = grid(path)
    if shown is not None:
        drawn = Table(title=shown.title, caption=shown.note, title_justify="left", caption_justify="left", box=SIMPLE)
        for index, name in enumerate(shown.header):
            drawn.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in shown.rows:
            drawn.add_row(*map(Text, row))
        out.print(drawn, soft_wrap=False)


def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(name), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print()
    out.print(table)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        out.print(line)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
