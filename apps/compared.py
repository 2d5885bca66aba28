"""Another run beside the one that is open, and what both have to do with each other; each computed once."""

import opened
import pandas as pd
import streamlit as st
from opened import Source

from ling_probe import compare_view
from ling_probe.analysis import ANALYSES
from ling_probe.errors import UsageError


def others() -> dict[str, Source]:
    """The other runs under the explorer's folder, by name."""
    folders = opened.run_folders(opened.root())
    return {name: opened.source_of(folder) for name, folder in folders.items() if str(folder) != opened.source()[0]}


@st.cache_data(show_spinner="Comparing the runs; done once", max_entries=32)
def comparison(first: Source, against: tuple[Source, ...], analysis: str) -> pd.DataFrame | UsageError:
    """A comparison of a run with others, or why they cannot be compared."""
    try:
        return ANALYSES[analysis].function([opened.open_run(each) for each in (first, *against)])
    except UsageError as error:
        return error


@st.cache_data(show_spinner=False, max_entries=16)
def checkpoints(final: Source, against: tuple[Source, ...]) -> tuple[Source, ...]:
    """Those runs that are earlier checkpoints of a run's training and read some of its problems."""
    run = opened.open_run(final)
    return tuple(each for each in against if compare_view.is_checkpoint(run, opened.open_run(each)))


@st.cache_data(show_spinner=False, max_entries=16)
def answers(first: Source, other: Source) -> pd.DataFrame:
    """See `compare_view.answers_side_by_side`."""
    return compare_view.answers_side_by_side(opened.open_run(first), opened.open_run(other))


@st.cache_data(show_spinner=False, max_entries=64)
def tokens(first: Source, other: Source, sequences: tuple[int, int], layer: int) -> pd.DataFrame | UsageError:
    """See `compare_view.token_overlap_table`."""
    try:
        runs = [opened.open_run(each) for each in (first, other)]
        return compare_view.token_overlap_table(runs, sequences, layer=layer)
    except UsageError as error:
        return error
