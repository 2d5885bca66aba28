"""The run that is open, and its tables, each computed once.

Only runs under the folder that the explorer was started with are opened, and of them only files that lie there.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from address import choose, chosen

from ling_probe import token_view
from ling_probe.analysis import ANALYSES
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run

Source = tuple[str, str]
"""Folder of a run and the digest of its manifest: what tables are cached by."""

CLEARED_WITH_RUN = ("family", "answers", "problem", "layer", "from", "token", "expert", "experts")


def root() -> Path:
    """The run, or folder of runs, that the explorer was started with."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else "runs").resolve()


def run_folders(base: Path) -> dict[str, Path]:
    """Runs by name: the folder itself, or those in it; links that lead out are left out.

    Raises:
        RunError: There are none.
    """
    if (base / "run.json").is_file():
        return {base.name: base}
    if not base.is_dir():
        raise RunError(f"{base} is no folder; start the explorer with a run or with a folder of runs")
    found = {path.parent.name: path.parent for path in sorted(base.glob("*/run.json")) if _inside(path, base)}
    if not found:
        raise RunError(f"{base} holds no runs; start the explorer with a run or with a folder of runs")
    return found


def choose_run() -> None:
    """Let the reader choose a run, and open it for the page.

    Raises:
        RunError: The address names a run that is not there, or the run is damaged.
    """
    folders = run_folders(root())
    asked = chosen("run")
    if asked is not None and asked not in folders:
        raise RunError(f"no run {asked!r} in {root()}; it has {', '.join(folders)}")
    with st.sidebar:
        name = choose("Run", "run", list(folders), clears=CLEARED_WITH_RUN)
    st.session_state["source"] = _source(folders[name])


def source() -> Source:
    """The run this session has open."""
    return st.session_state["source"]


def open_run(source: Source) -> Run:
    """Open a run.

    Raises:
        RunError: It is damaged, or one of its files is a link that leads out of the explorer's folder.
    """
    run = Run.open(source[0])
    for path in run.folder.glob("parts/*/*.parquet"):
        if not _inside(path, root()):
            raise RunError(f"{path} leads out of {root()}; the explorer reads only what lies there")
    return run


@st.cache_data(show_spinner="Computing over the whole run; done once", max_entries=64)
def table(source: Source, analysis: str) -> pd.DataFrame | UsageError:
    """An analysis of the run, or why the run cannot answer it."""
    try:
        return ANALYSES[analysis].function(open_run(source))
    except UsageError as error:
        return error


@st.cache_data(show_spinner=False, max_entries=16)
def problems(source: Source) -> pd.DataFrame:
    """See `token_view.problem_table`."""
    return token_view.problem_table(open_run(source))


@st.cache_data(show_spinner=False, max_entries=64)
def facts(source: Source, sequence: int) -> dict[str, Any]:
    """See `token_view.problem_facts`."""
    return token_view.problem_facts(open_run(source), sequence)


@st.cache_data(show_spinner=False, max_entries=64)
def tokens(source: Source, sequence: int, layer: int) -> pd.DataFrame:
    """See `token_view.token_table`."""
    return token_view.token_table(open_run(source), sequence, layer=layer)


@st.cache_data(show_spinner=False, max_entries=64)
def layers(source: Source, sequence: int, position: int) -> pd.DataFrame:
    """See `token_view.token_layers`."""
    return token_view.token_layers(open_run(source), sequence, position)


@st.cache_data(show_spinner=False, max_entries=64)
def example(source: Source, label: str) -> str:
    """Id of the sequence that shows a step label best."""
    return str(problems(source)["sequence_id"].iloc[token_view.example_sequence(open_run(source), label)])


def _source(folder: Path) -> Source:
    try:
        return str(folder), hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{folder / 'run.json'} cannot be read ({error.strerror}); copy the run again") from error


def _inside(path: Path, base: Path) -> bool:
    return path.resolve().is_relative_to(base)
