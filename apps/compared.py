"""Another run beside the one that is open, and what both have to do with each other; each computed once."""

from contextlib import suppress

import opened
import pandas as pd
import streamlit as st
from opened import Source

from ling_probe import compare_view
from ling_probe.analysis import ANALYSES
from ling_probe.errors import RunError, UsageError


@st.cache_data(show_spinner="Comparing the runs; done once", max_entries=32)
def comparison(first: Source, against: tuple[Source, ...], analysis: str) -> pd.DataFrame | UsageError:
    """A comparison of a run with others, or why they cannot be compared."""
    try:
        return ANALYSES[analysis].function([opened.open_run(each) for each in (first, *against)])
    except UsageError as error:
        return error


@st.cache_data(show_spinner=False, max_entries=16)
def checkpoints(final: Source, names: tuple[str, ...]) -> tuple[Source, ...]:
    """Other runs of the folder that are of earlier checkpoints of a run's training and read some of its problems."""
    run, found = opened.open_run(final), []
    for name in names:
        with suppress(RunError):
            there = opened.other(name)
            found += [there] if compare_view.is_checkpoint(run, opened.open_run(there)) else []
    return tuple(found)


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
