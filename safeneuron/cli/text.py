"""The verbs on texts: judge, redteam, draw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from safeneuron.cli import console
from safeneuron.cli.console import Bars, Changes, print_lines, toml_string
from safeneuron.errors import InputError
from safeneuron.runtime.patches import without_progress_bars


def draw_command(
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
    from safeneuron.data.prompts import read_prompts
    from safeneuron.data.typography import drawn_prompts
    from safeneuron.runtime.files import write_lines

    prompts = drawn_prompts(read_prompts(source, split=split, column=column, count=count), said, size, font)
    write_lines(out_folder / "prompts.jsonl", (prompt.to_record(out_folder) for prompt in prompts))
    console.out.print(
        f"wrote {out_folder / 'prompts.jsonl'}: {len(prompts)} prompts, their texts drawn in {out_folder / 'images'}"
    )


def redteam_command(
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
    without_progress_bars()
    from safeneuron.data.prompts import read_prompts
    from safeneuron.evaluation.judging import make_judge
    from safeneuron.models.loading import load, quiet
    from safeneuron.neurons.neuron_set import NeuronSet
    from safeneuron.runs.redteam import RedTeam, prepare_redteam, red_team, table
    from safeneuron.runs.run import Run

    quiet()
    settings = RedTeam(per_seed, seed, temperature, top_p, max_new_tokens, batch_size)
    opened = Run.create(out_folder)
    with opened.locked():
        prepare_redteam(opened, redo)
        requests = read_prompts(prompts, split="test" if prompts == "twins:unsafe" else "", count=count)
        chosen = NeuronSet.load(neurons) if neurons is not None else None
        bars, began = Bars(), time.monotonic()
        with bars.bars:
            bars.began("redteam")
            results = red_team(
                load(model, dtype), chosen, requests, make_judge(judge), out_folder, settings, bars.progress
            )
            bars.ended("redteam", time.monotonic() - began, skipped=False)
    print_lines(["", *table(results), "", f"wrote {out_folder}, which holds harmful text: do not publish it"])


def judge_command(
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
    from safeneuron.config.toml import read_config
    from safeneuron.runtime.files import write_lines

    wanted = [f"judge.name=[{', '.join(toml_string(name) for name in names)}]"] if names else []
    table = read_config("default", [*wanted, f"judge.rule={toml_string(rule)}", *(changes or [])]).judge
    written = target or path.with_name(f"{path.stem}.judged.jsonl")
    if written.exists() and written.resolve() == path.resolve():
        raise InputError(f"{written} is the file to be judged, and would be lost; give another one with --out")
    from safeneuron.evaluation.judging import judged, read_answers, verdict_lines
    from safeneuron.models.loading import quiet
    from safeneuron.runs.inputs import judges_of

    quiet()
    rows, answers = read_answers(path, prompt, response)
    (found,) = judged(judges_of(table), table.rule, [answers])
    write_lines(written, ({**row, **record} for row, record in zip(rows, found.records(), strict=True)))
    print_lines([*verdict_lines(found, table.label), f"wrote {written}"])
