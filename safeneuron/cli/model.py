"""The verbs on a model or a config alone: doctor, plan, prune, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from safeneuron.cli import console
from safeneuron.cli.console import Changes, print_lines
from safeneuron.errors import InputError


def prune_command(
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
    from safeneuron.attacks.checkpoint import write_pruned
    from safeneuron.models.loading import load, quiet
    from safeneuron.neurons.interventions import Edit
    from safeneuron.neurons.neuron_set import NeuronSet

    quiet()
    chosen = NeuronSet.load(neurons)
    loaded = load(model, dtype="stored", device=device)
    if transfer:
        chosen = chosen.transferred(loaded.fingerprint, loaded.widths)
    edit = Edit.scale(chosen, factor) if value is None else Edit.clamp(chosen, value)
    write_pruned(loaded, edit, out_folder)
    console.out.print(f"wrote {out_folder}: {loaded.name} with {edit.name} at {chosen}")


def config_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a bundled config.")] = "default",
    schema: Annotated[
        Literal["config", "neurons", "results"] | None,
        typer.Option("--schema", help="Print the JSON schema of such a file instead."),
    ] = None,
) -> None:
    """Print a complete config, every key with its meaning."""
    if schema is not None:
        print_lines([json.dumps(_schema(schema), indent=2, ensure_ascii=False)])
        return
    from safeneuron.config.toml import presets, read_config, to_toml
    from safeneuron.errors import did_you_mean

    if name not in presets():
        known = ", ".join(presets())
        raise InputError(f"there is no bundled config {name!r}{did_you_mean(name, presets())}; there are {known}")
    print_lines([to_toml(read_config(name)).rstrip("\n")])


def _schema(name: str) -> dict[str, Any]:
    """The JSON schema of a kind of file, made from the types that read and write it."""
    from pydantic import TypeAdapter

    if name == "results":
        from safeneuron.reporting.results import results_schema

        return results_schema()
    if name == "neurons":
        from safeneuron.neurons.neuron_set import NeuronSetRecord

        properties = TypeAdapter(NeuronSetRecord).json_schema()
    else:
        from safeneuron.config.schema import Config

        properties = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **properties}


def doctor_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="embedded, a folder, or a name on the Hub.")],
    weights: Annotated[
        bool, typer.Option("--weights/--config-only", help="Load it and prove it, or read its config alone?")
    ] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Where a model's neurons lie and what each owns, proved on its weights, and what cannot be done with it."""
    from rich.table import Table

    from safeneuron.models.doctor import examine
    from safeneuron.models.loading import quiet

    quiet()
    diagnosis = examine(model, weights=weights, device=device)
    known = f", fingerprint {diagnosis.fingerprint}" if diagnosis.fingerprint else ""
    console.out.print(f"{diagnosis.name} ({diagnosis.kind}): {diagnosis.neurons:,} neurons{known}")
    table = Table("layers", "FFN", "neurons", "form")
    table.add_column("neuron j owns", no_wrap=True)
    for row in diagnosis.rows:
        table.add_row(row.layers, row.ffn, row.neurons, row.form, Text("\n".join(row.owns)))
    console.out.print(table)
    print_lines(diagnosis.remarks)


def plan_command(
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
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="RUN", help="A run whose seconds say how long it takes; runs/NAME if not given."
        ),
    ] = None,
) -> None:
    """What each stage will need in memory and time, and whether it fits; reads the model's config, not its weights."""
    from safeneuron.config.toml import read_config
    from safeneuron.planning.duration import TimeRecord, table_of_times
    from safeneuron.planning.plan import device_asked, table_of_needs

    settings = read_config(config, changes or [])
    device = device_asked(settings, device_memory, devices, sharded)
    print_lines([*table_of_needs(settings, device), ""])
    run = like or Path("runs") / settings.name
    if like is None and not (run / "config.toml").is_file():
        print_lines(["time: unknown; --like RUN takes it from the seconds that the finished stages of a run recorded"])
    else:
        print_lines(table_of_times(settings, TimeRecord.read(run)))
