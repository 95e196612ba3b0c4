"""The command line: verbs, progress bars, and errors as one sentence. Heavy imports happen inside the verbs."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text
from typer.core import TyperGroup

from safeneuron.cli import console, inspect, model, run, text
from safeneuron.errors import InputError, RenamedSetting
from safeneuron.runtime import distributed
from safeneuron.runtime.patches import warnings_told


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the user can mend into one sentence; errors of the program keep their traceback."""
    try:
        yield
        distributed.leave()
    except InputError as error:
        _end(2, Text.assemble(("error: ", "red"), str(error)))
    except KeyboardInterrupt:
        _end(130, Text("stopped; what is finished is kept, and the same command goes on from here"))
    except (typer.Exit, typer.Abort):
        raise
    except typer.TyperException as error:
        # Every process was given the same words; what is wrong with them is said once.
        if not distributed.is_main():
            sys.exit(error.exit_code)
        raise
    except Exception as error:
        from safeneuron.runtime.files import FREE_SPACE, disk_full

        if disk_full(error):
            _end(2, Text.assemble(("error: ", "red"), f"the disk is full ({error}); {FREE_SPACE}"))
        code = distributed.first_to_fail(1)
        if code is not None:
            sys.exit(code)
        raise


def _end(code: int, sentence: Text) -> NoReturn:
    """End the program; of many processes the one that fails first says why, and the others end as it does."""
    first = distributed.first_to_fail(code)
    if first is None:
        console.err.print(sentence)
    sys.exit(code if first is None else first)


class Verbs(TyperGroup):
    """The verbs, each explaining its errors; typer would end the program at Ctrl-C without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was asked for."""
        # Python hides warnings about what is out of date from all but programmers; a config's author is to read them.
        with _explained(), warnings.catch_warnings(), warnings_told(RenamedSetting, console.warn):
            warnings.simplefilter("default", RenamedSetting)
            return super().invoke(ctx)


app = typer.Typer(
    cls=Verbs,
    help="Find a model's safety neurons, train safety into the rest of the network, and prove it by pruning attacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

VERBS = (
    run.run_command, run.audit_command, run.measure_command, run.select_command,
    run.align_command, run.attack_command, run.report_command, inspect.analyse_command,
    inspect.publish_command, model.prune_command, text.draw_command, inspect.compare_command,
    model.config_command, model.doctor_command, model.plan_command, text.redteam_command,
    inspect.show_command, text.judge_command,
)  # fmt: skip
for verb in VERBS:
    app.command(verb.__name__.removesuffix("_command"))(verb)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from safeneuron._version import __version__

        console.out.print(f"safeneuron {__version__}")
        raise typer.Exit


def main() -> None:
    """The program ``safeneuron``: exit code 2 for a mistake of the user, 130 for Ctrl-C."""
    if distributed.world() > 1:
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
