"""What the page of steps reads, each computed once."""

import opened
import pandas as pd
import streamlit as st

from ling_probe import state_view, step_view
from ling_probe.errors import UsageError


@st.cache_resource(show_spinner="Fitting routing states on half of the problems; done once", max_entries=4)
def states(source: opened.Source) -> state_view.StateTables | UsageError:
    """See `state_view.state_tables`, or why the run has none."""
    try:
        return state_view.state_tables(opened.open_run(source))
    except UsageError as error:
        return error


@st.cache_resource(show_spinner=False, max_entries=64)
def problem(source: opened.Source, sequence: int) -> state_view.ProblemStates:
    """See `state_view.problem_states`; of a run that has states."""
    tables = states(source)
    assert isinstance(tables, state_view.StateTables)
    return state_view.problem_states(opened.open_run(source), sequence, tables)


@st.cache_data(show_spinner=False, max_entries=64)
def steps(source: opened.Source, sequence: int) -> pd.DataFrame | UsageError:
    """See `step_view.step_table`, or why there is none."""
    specialisation = opened.table(source, "label_specialisation")
    try:
        return (
            specialisation
            if isinstance(specialisation, UsageError)
            else step_view.step_table(opened.open_run(source), sequence, specialisation)
        )
    except UsageError as error:
        return error


@st.cache_data(show_spinner=False, max_entries=64)
def attribution(source: opened.Source, sequence: int) -> pd.DataFrame | UsageError:
    """See `step_view.answer_attribution`, by layer, or why there is none."""
    try:
        return step_view.attribution_by_layer(step_view.answer_attribution(opened.open_run(source), sequence), first=1)
    except UsageError as error:
        return error
