"""The command line: quick help, one sentence for every mistake, and exit codes."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import safeneuron
from safeneuron.cli import run
from safeneuron.errors import InputError
from tests.helpers.command_line import ENVIRONMENT, PROGRAM, invoke, program, refusal

VERBS = (
    "run", "audit", "measure", "select", "align", "attack", "report", "publish", "redteam", "judge", "prune", "compare",
    "config", "plan", "show",
)  # fmt: skip


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_answers_at_once():
    """Processor time, best of five: what the program itself takes, however busy the machine is."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = program("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    done = invoke(verb, "--help")
    assert done.exit_code == 0
    assert "Usage: " in done.stdout
    stages = ("run", "audit", "measure", "select", "align", "attack", "report")
    options = {"--set", "--out", "--redo"} if verb in stages else {"--help"}
    assert options <= set(re.findall(r"--\w+", done.stdout))
    assert not re.search(r"\[/?(dim|red|bold)\]", done.stdout)


def test_help_of_a_verb_loads_nothing_heavy():
    code = "import sys\nfrom safeneuron.cli.app import app\ntry: app(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'scipy', 'safeneuron.config.tables'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, capture_output=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_verbs(shell):
    """What the program answers to the script that ``--install-completion`` writes, here to ``safeneuron rep<Tab>``."""
    asked = {"_SAFENEURON_COMPLETE": f"complete_{shell}", "COMP_WORDS": "safeneuron rep", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "safeneuron rep", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import sys; sys.argv = ['safeneuron']; from safeneuron.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**ENVIRONMENT, **asked})
    assert "report" in done.stdout
    assert "redteam" not in done.stdout
    assert "--install-completion" in invoke("--help").stdout


def test_version():
    assert invoke("--version").stdout == f"safeneuron {safeneuron.__version__}\n"


def test_without_a_verb_the_help_is_shown():
    assert "Usage: " in invoke().output


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "'run'"),
        (["run"], "CONFIG"),
        (["audit"], "MODEL"),
        (["measure"], "RUN"),
        (["run", "demo", "--rdo", "x"], "--redo"),
        (["run", "demo", "--set"], "--set"),
        (["show", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.toml"], "'nowhere.toml' cannot be read"),
        (["run", "dmeo"], "did you mean 'demo'?"),
        (["run", "demo", "--set", "align.round=2"], "did you mean 'rounds'?"),
        (["run", "demo", "--set", "align.beta=0"], "align.beta = 0 cannot be used"),
        (["run", "demo", "--set", "align.beta"], "--set expects table.key=value"),
        (["run", "demo", "--out", "file"], "file cannot be written"),
        (["run", "demo", "--out", "file/run"], "file/run cannot be written"),
        (["run", "demo", "--out", "."], "holds files but no run"),
        (["run", "demo", "--out", "new", "--redo", "T0/attack"], "the run has no such stage; it has none yet"),
        (["measure", "folder"], "folder is not the folder of a run"),
        (["attack", "nowhere"], "'nowhere' cannot be read"),
        (["config", "dmeo"], "did you mean 'demo'?"),
        (["show", "nowhere"], "nowhere does not exist"),
        (["show", "file"], "not an artefact"),
        (["show", "folder"], "neither a run, nor a stage"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder").mkdir()
    assert said in refusal(invoke(*arguments))


def test_a_malformed_config_names_its_line(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("seed = 1\n[align\n")
    message = refusal(invoke("run", path))
    assert "line 2" in message
    assert str(path) in message


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "_execute", fail)
    done = invoke("run", "demo")
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_any_errors_for_a_full_disk_are_one_sentence(monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_execute", fail)
    assert "the disk is full" in refusal(invoke("run", "demo"))


def test_brackets_in_texts_are_no_markup(monkeypatch, tmp_path):
    def fail(*_):
        raise InputError("a [red]text[/red] of :smile: [brackets]")

    monkeypatch.setattr(run, "_execute", fail)
    assert refusal(invoke("run", "demo")) == "error: a [red]text[/red] of :smile: [brackets]"


def test_an_output_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "config", "demo"], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [*PROGRAM, "config", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
