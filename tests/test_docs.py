"""What the README shows must run."""

import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from synthetic import synthetic_run
from typer.main import get_command

from ling_probe.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shown_commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line.split("ling-probe ", 1)[1].split() for line in lines if "ling-probe " in line]


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_a_shown_command_parses(words):
    verb = get_command(app).commands[words[0]]
    verb.make_context(words[0], list(words[1:]), resilient_parsing=False)


def test_the_shown_program_runs():
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "arithmetic-test-0000" in done.stdout


def test_the_shown_query_runs(tmp_path):
    synthetic_run(tmp_path / "runs" / "demo", 9)
    (query,) = blocks("sql")
    rows = duckdb.sql(query.replace("'runs/", f"'{tmp_path}/runs/")).fetchall()
    assert {row[0] for row in rows} >= {"prompt", "reasoning", "answer"}


def test_the_tree_in_the_readme_is_there():
    tree = README.split("## The tree")[1]
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert list((ROOT / "ling_probe").rglob(name)), name
    for name in ("apps", "analyses", "datasets", "docs", "tests"):
        assert (ROOT / name).is_dir()


def test_the_readme_and_files_name_no_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    texts = [
        ROOT / name for name in tracked if name.endswith((".py", ".md", ".toml", ".txt", ".j2", ".yml")) or name == "Makefile"
    ]
    home = re.compile(r"(?<![\w.])/(?:root|home/\w+|work)/")
    assert [str(path) for path in texts if path.is_file() and home.search(path.read_text(encoding="utf-8"))] == []


def test_pictures_in_the_readme_exist():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture
