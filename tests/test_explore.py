"""How the explorer is started: on this machine only, unless told otherwise."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ling_probe.cli import app

EXPLORER = Path(__file__).parents[1] / "apps/explorer.py"


def started(monkeypatch, *arguments) -> list[str]:
    """The command that `ling-probe explore` runs."""
    commands = []

    def ran(command, **_options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", ran)
    done = CliRunner().invoke(app, ["explore", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    (command,) = commands
    return command


def option(command, name) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize(("told", "address"), [((), "127.0.0.1"), (("--host", "0.0.0.0"), "0.0.0.0")])
def test_it_listens_on_this_machine_unless_told_otherwise(make_run, monkeypatch, told, address):
    run = make_run(3)
    command = started(monkeypatch, run.folder, *told)
    assert option(command, "--server.address") == address
    assert option(command, "--browser.gatherUsageStats") == "false"
    assert command[-2:] == ["--", str(run.folder)]


def test_the_documented_line_is_as_safe():
    line = next(line for line in EXPLORER.read_text(encoding="utf-8").splitlines() if line.startswith("streamlit run"))
    command = shlex.split(line)
    assert option(command, "--server.address") == "127.0.0.1"
    assert option(command, "--browser.gatherUsageStats") == "false"


def test_nothing_that_runs_a_strangers_code_is_used():
    package = EXPLORER.parents[1] / "ling_probe"
    read = [*EXPLORER.parent.rglob("*.py"), *(package / "run").glob("*.py"), *(package / "analysis").glob("*.py")]
    unsafe = r"\bpickle\b|allow_pickle|joblib|\beval\(|\bexec\(|trust_remote_code|yaml\.load|torch\.load"
    for path in read:
        assert not re.search(unsafe, path.read_text(encoding="utf-8")), path
