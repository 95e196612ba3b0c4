"""The command line: quick help, one sentence for every mistake, exit codes, Ctrl-C, and a whole run from the shell."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import safeneuron
from safeneuron.cli import app, console, run
from safeneuron.config.toml import parse_config, presets, read_config
from safeneuron.errors import InputError
from tests.helpers.tiny_run import results

VERBS = (
    "run", "audit", "measure", "select", "align", "attack", "report", "publish", "redteam", "judge", "prune", "compare",
    "config", "plan", "show",
)  # fmt: skip
PROGRAM = [sys.executable, "-c", "from safeneuron.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(safeneuron.__file__).parents[1]), "COLUMNS": "100"}
SMALL = [
    *("--set", 'attack.sets=["FULL"]', "--set", 'attack.knowledge=["static"]', "--set", "attack.random=false"),
    *("--set", "attack.curve=[]", "--set", "variants={}", "--set", "align.rounds=1"),
]


def invoke(*arguments: object) -> Result:
    """The program in this process."""
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=ENVIRONMENT, **options)


def refusal(result: Result) -> str:
    """The one sentence on stderr of a program that ended with exit code 2."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


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
    code = "import sys\nfrom safeneuron.cli import app\ntry: app(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'scipy', 'safeneuron.config.tables'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, capture_output=True)


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


def test_an_audit_of_a_missing_model_says_so(finished_run, tmp_path):
    config = finished_run[1]
    prompts = [f"data.{role}=[{{path='{config.parent}/{role}.jsonl'}}]" for role in
               ("unsafe", "safe", "test_unsafe", "test_safe")]  # fmt: skip
    missing = tmp_path / "models" / "nothing here"
    done = invoke("audit", missing, "--out", tmp_path / "run", *(part for one in prompts for part in ("--set", one)))
    *warnings, error = done.stderr.splitlines()
    assert done.exit_code == 2
    assert error.startswith(f"error: the model {str(missing)!r} cannot be loaded")
    assert all(line.startswith("warning: ") for line in warnings)
    assert parse_config((tmp_path / "run" / "config.toml").read_text(), "").name == "audit-nothing-here"


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


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_config_prints_the_preset(name):
    done = invoke("config", name)
    assert done.exit_code == 0
    assert parse_config(done.stdout, "printed") == read_config(name)
    assert "# " in done.stdout


def test_config_without_a_name_prints_the_default():
    assert tomllib.loads(invoke("config").stdout) == tomllib.loads(invoke("config", "default").stdout)


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """A small run made by the program: ``(config, its folder, what it printed)``."""
    folder = tmp_path_factory.mktemp("cli") / "run [1]"
    done = invoke("run", finished_run[1], "--out", folder, *SMALL)
    assert done.exit_code == 0, done.output
    return finished_run[1], folder, done


def test_a_run_prints_its_stages_its_table_and_its_files(finished):
    _, folder, done = finished
    lines = done.stdout.splitlines()
    assert lines[0] == "data ..."
    assert re.fullmatch(r"data: done in \d+\.\d s", lines[1])
    assert any(line.startswith("T1/align: done in ") for line in lines)
    table = lines.index("ASR in % of " + read_config(folder / "config.toml").model.name
                        + ": harmful test prompts that are answered, by neurons pruned")  # fmt: skip
    assert [line.split("  ")[0] for line in lines[table + 3 : table + 5]] == ["base model", "freeze"]
    assert lines[-3:] == [f"wrote {folder}/report/{name}" for name in ("report.html", "report.md", "results.json")]
    assert all(Path(line.removeprefix("wrote ")).is_file() for line in lines[-3:])
    warnings = done.stderr.splitlines()
    assert all(line.startswith("warning: ") for line in warnings)
    assert len(warnings) == len(set(warnings)) > 0


def test_run_again_skips_everything_in_one_line_each(finished):
    config, folder, _ = finished
    done = invoke("run", config, "--out", folder, *SMALL)
    lines = done.stdout.splitlines()
    stages = [line.removesuffix(": done before, skipped") for line in lines if line.endswith(": done before, skipped")]
    assert stages == ["data", "T0/measure", "T0/select", "T0/attack", "T0/judge", "T0/pairs", "T1/align", "T1/measure",
                      "T1/select", "T1/attack", "T1/judge", "report"]  # fmt: skip
    assert lines[len(stages)] == ""
    assert done.stderr == ""
    assert "..." not in done.stdout


def test_redo_and_verbs_take_the_folder_of_the_run(finished):
    _, folder, _ = finished
    expected = results(folder)
    done = invoke("attack", folder, "--redo", "T1/judge")
    assert done.exit_code == 0
    assert "report: deleted, will be made again\nT1/judge: deleted, will be made again" in done.stdout
    assert "T1/judge: done in" in done.stdout
    assert "is not complete yet; continue with: safeneuron run" in done.stdout
    assert invoke("report", folder).stdout.splitlines()[-1] == f"wrote {folder}/report/results.json"
    assert results(folder) == expected


def test_a_changed_setting_is_refused_with_its_name(finished):
    config, folder, _ = finished
    message = refusal(invoke("run", config, "--out", folder, *SMALL, "--set", "align.beta=0.5"))
    assert "align.beta was 0.1 and is now 0.5" in message
    assert invoke("report", folder).exit_code == 0, "the run still has its own config"


def test_a_run_in_use_is_refused(finished):
    from safeneuron.runs.run import Run

    config, folder, _ = finished
    with Run(folder).locked():
        assert "another process is working on" in refusal(invoke("run", config, "--out", folder, *SMALL))


def test_plan_prints_a_table_without_the_weights(finished_run, tmp_path):
    """Of a model whose folder has nothing but its config."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((finished_run[1].parent / "model" / "config.json").read_text())
    changes = ("--set", f'model.name="{tmp_path / "model"}"', "--set", "variants={}")
    done = invoke("plan", finished_run[1], *changes, "--device-memory", "24GB", "--devices", 2, "--replicated")
    lines = done.stdout.splitlines()
    assert lines[1] == "on each of 2 devices with 24.0 GB, each of which holds everything (DDP); figures in GB"
    assert lines[3].split() == ["measure", "attack", "align"]
    assert ["fits", "yes", "yes", "yes"] in [line.split() for line in lines]
    assert lines[-3].startswith("align: fits with 1 pair at a time, up to ")
    assert lines[-1].startswith("time: unknown")
    timed = invoke("plan", finished_run[1], *changes, "--like", finished_run[0]).stdout.splitlines()
    assert [line.split()[0] for line in timed[-10:-3]][-4:] == ["attack", "judge", "pairs", "align"]
    assert "expects a size such as 80GB" in refusal(invoke("plan", "demo", "--device-memory", "huge"))


def test_show_explains_the_run(finished):
    _, folder, _ = finished
    done = invoke("show", folder)
    assert done.exit_code == 0
    assert done.stdout.startswith("A run: 12 finished stages")
    assert "ASR in %" in done.stdout
    assert "Scores of 144 neurons" in invoke("show", folder / "T0" / "select" / "scores.safetensors").stdout


def test_without_out_the_run_stands_under_its_name(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("measure", finished_run[1], *SMALL)
    assert done.exit_code == 0
    assert (tmp_path / "runs" / "tiny" / "T0" / "measure" / "done.json").exists()


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(finished, tmp_path):
    config, straight, _ = finished
    arguments = ["run", str(config), "--out", str(tmp_path / "run"), *SMALL]
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    for line in process.stdout:
        if line.startswith("T1/align ..."):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; what is finished is kept, and the same command goes on from here"
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "T1" / "align" / "done.json").exists()
    done = invoke(*arguments)
    assert done.exit_code == 0
    assert "T0/attack: done before, skipped" in done.stdout
    assert results(tmp_path / "run") == results(straight)
    assert json.loads(results(straight))["states"][1]["align"]["steps"] == 4


# -- on a terminal ----------------------------------------------------------------------------------------------------


def test_a_bar_estimates_the_time_left_also_when_steps_are_slow(monkeypatch):
    clock = [0.0]
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console, "out", terminal)
    bars = console.Bars()
    bars.bars.get_time = lambda: clock[0]
    bars.began("T1/attack")
    for step in (1, 2, 3):
        clock[0] = 200.0 * step
        bars.progress(step, 10)
    (task,) = bars.bars.tasks
    assert task.time_remaining == 7 * 200
    bars.ended("T1/attack", 600.0, skipped=False)
    assert bars.bars.tasks == []
    assert "T1/attack: done in 600.0 s" in terminal.file.getvalue()
