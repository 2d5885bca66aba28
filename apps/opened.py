"""The run that is open, and its tables, each computed once and kept beside it.

Only runs under the folder that the explorer was started with are opened, and of them only files that lie there.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from address import choose, chosen
from computing import wait_for

from ling_probe import report, token_view
from ling_probe.analysis import SINGLE, answer_once, finding, findings_index
from ling_probe.analysis.kept import is_kept, kept_answer
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.run.folder import CAUSAL_EFFECTS

Source = tuple[str, str]
"""Folder of a run and the digest of its manifest: what tables are cached by."""

SMALL = 20_000
"""Tokens of a run that is computed on the spot: a process of its own would take longer to start."""
TABLES = 24
"""Held in memory; the largest take some 50 MB."""
FILES = ("run.json", "*.safetensors", "parts", "parts/*", "parts/*/*", "causal", "causal/*", "analysis", "analysis/*")
"""What is read of a run folder, and so must lie under the explorer's."""
CLEARED_WITH_RUN = (
    "family", "answers", "problem", "layer", "from", "token", "expert", "experts", "label", "of", "against", "text",
    "beside", "beside-problem", "beside-text", "layers", "top", "least", "by", "shade", "view",
)  # fmt: skip


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
        RunError: It is damaged.
    """
    return Run.open(source[0])


def table(source: Source, analysis: str) -> pd.DataFrame | UsageError:
    """An analysis of the run, or why the run cannot answer it.

    It is read where the run's folder keeps it. Else the page shows what it has so far and waits for a process that computes and
    keeps it: pages ask for tables after they have shown what needs none.
    """
    answers, key = _answers(), (*source, analysis)
    answer = answers.get(key)
    if answer is None:
        run = open_run(source)
        small = sum(part.tokens for part in run.manifest.parts) <= SMALL
        answer = answer_once(run, analysis) if small else kept_answer(run, analysis)
        if answer is None:
            answer = wait_for(key)
        answers[key] = answer
        while len(answers) > TABLES:
            answers.pop(next(iter(answers)), None)
    return answer if isinstance(answer, UsageError) else answer.copy(deep=False)


@st.cache_resource
def _answers() -> dict[tuple[str, str, str], pd.DataFrame | UsageError]:
    """The last tables that were shown, the same for all sessions."""
    return {}


@st.cache_data(show_spinner=False, max_entries=16)
def headline(source: Source, *analyses: str) -> dict[str, Any]:
    """See `report.headline`; of tables, it knows those that `table` has shown and that are named here."""
    return report.headline(open_run(source), {name: table(source, name) for name in analyses})


def findings(source: Source) -> pd.DataFrame:
    """Index of what was found, of the analyses whose answers the run keeps; nothing is computed."""
    run = open_run(source)
    return _findings(source, tuple(name for name in SINGLE if is_kept(run, name)))


@st.cache_data(show_spinner=False, max_entries=16)
def _findings(source: Source, names: tuple[str, ...]) -> pd.DataFrame:
    run = open_run(source)
    kept = ((name, kept_answer(run, name)) for name in names)
    found = {name: finding(name, answer) for name, answer in kept if answer is not None}
    return findings_index(found) if found else pd.DataFrame(columns=["analysis", "question", "finding", "verdict"])


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
def scale(source: Source, sequence: int, layer: int, by: str, against: Source | None) -> token_view.Scale | UsageError:
    """See `token_view.token_scale`."""
    other = open_run(against) if against else None
    try:
        return token_view.token_scale(open_run(source), sequence, layer=layer, by=by, against=other)
    except UsageError as error:
        return error


def others() -> list[str]:
    """Names of the other runs of the explorer's folder."""
    return [name for name, folder in run_folders(root()).items() if str(folder) != source()[0]]


def other(name: str) -> Source:
    """Another run of the explorer's folder, by a name of `others`."""
    return _source(run_folders(root())[name])


def layers(source: Source, sequence: int, position: int) -> pd.DataFrame:
    """See `token_view.token_layers`."""
    return token_view.token_layers(_choices(source, sequence), position)


@st.cache_resource(show_spinner=False, max_entries=8)
def _choices(source: Source, sequence: int) -> token_view.Choices:
    return token_view.sequence_choices(open_run(source), sequence)


@st.cache_data(show_spinner=False, max_entries=64)
def example(source: Source, label: str) -> str:
    """Id of the sequence that shows a step label best."""
    return str(problems(source)["sequence_id"].iloc[token_view.example_sequence(open_run(source), label)])


def _source(folder: Path) -> Source:
    """The run in a folder, all of whose files must lie under the explorer's.

    Raises:
        RunError: One is a link that leads out, or run.json cannot be read.
    """
    for path in (each for pattern in FILES for each in folder.glob(pattern)):
        if not _inside(path, root()):
            raise RunError(f"{path} leads out of {root()}; the explorer reads only what lies there")
    causal = folder / CAUSAL_EFFECTS
    try:
        said = (folder / "run.json").read_bytes() + (causal.read_bytes() if causal.is_file() else b"")
    except OSError as error:
        raise RunError(f"{folder / 'run.json'} cannot be read ({error.strerror}); copy the run again") from error
    return str(folder), hashlib.sha256(said).hexdigest()


def _inside(path: Path, base: Path) -> bool:
    return path.resolve().is_relative_to(base)
