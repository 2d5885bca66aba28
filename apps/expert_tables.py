"""The list of experts of the open run and what is known of each, each computed once."""

from typing import Any

import opened
import pandas as pd
import streamlit as st

from ling_probe import expert_view
from ling_probe.analysis.promoted import promoted_tokens
from ling_probe.errors import UsageError


@st.cache_data(show_spinner=False, max_entries=4)
def experts(source: opened.Source) -> pd.DataFrame:
    """See `expert_view.expert_list`."""
    tables = {name: opened.table(source, name) for name in expert_view.LISTED}
    return expert_view.expert_list(opened.open_run(source), tables)


@st.cache_data(show_spinner=False, max_entries=256)
def facts(source: opened.Source, layer: int, expert: int) -> dict[str, Any]:
    """See `expert_view.expert_facts`."""
    run = opened.open_run(source)
    return expert_view.expert_facts(
        run, layer, expert, _of_layer(source, layer), largest=_largest(source, layer), promoted=_promoted(source, layer)
    )


@st.cache_resource(show_spinner=False, max_entries=32)
def _of_layer(source: opened.Source, layer: int) -> expert_view.Tables:
    """The rows of one layer, so that the next expert of it does not read whole tables."""
    return {name: expert_view.of_layer(opened.table(source, name), layer) for name in expert_view.NEEDED}


@st.cache_data(show_spinner="Reading the layer's tokens; done once", max_entries=64)
def _largest(source: opened.Source, layer: int) -> pd.DataFrame:
    return expert_view.largest_weights(opened.open_run(source), layer)


@st.cache_data(show_spinner="Reading the layer's tokens; done once", max_entries=64)
def _promoted(source: opened.Source, layer: int) -> pd.DataFrame | UsageError:
    try:
        return promoted_tokens(opened.open_run(source), layer)
    except UsageError as error:
        return error
