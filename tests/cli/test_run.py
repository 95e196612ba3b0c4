"""A whole run from the shell: what is printed, skipped, refused, and gone on with after Ctrl-C."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from safeneuron.config.toml import parse_config, read_config
from tests.helpers.command_line import ENVIRONMENT, PROGRAM, SMALL, invoke, refusal
from tests.helpers.tiny_run import results


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


def test_without_out_the_run_stands_under_its_name(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("measure", finished_run[1], *SMALL)
    assert done.exit_code == 0
    assert (tmp_path / "runs" / "tiny" / "T0" / "measure" / "done.json").exists()


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
