"""Paths of the open run and the flows of sets of its tokens, each computed once."""

from collections.abc import Sequence

import opened
import pandas as pd
import streamlit as st

from ling_probe import path_view
from ling_probe.errors import UsageError

ALL, REST = "all", "rest"
Chosen = tuple[str, str]
"""A set of tokens: its kind ("all", "label", "family", "problem", "text") and which."""


@st.cache_resource(show_spinner="Reading the paths of the run; done once", max_entries=2)
def paths(source: opened.Source) -> path_view.Paths:
    """See `path_view.read_paths`."""
    return path_view.read_paths(opened.open_run(source))


@st.cache_data(show_spinner=False, max_entries=64)
def flows(
    source: opened.Source, one: Chosen, other: Chosen | None, layers: Sequence[int], top: int
) -> pd.DataFrame | UsageError:
    """`path_view.flow_table` of a set, or of what it is compared with where `other` is given; a refusal says why not."""
    try:
        return path_view.flow_table(_tokens(source, one, other, layers), layers, top=top)
    except UsageError as error:
        return error


@st.cache_data(show_spinner=False, max_entries=32)
def differences(
    source: opened.Source, one: Chosen, other: Chosen, layers: Sequence[int], top: int
) -> pd.DataFrame | UsageError:
    """`path_view.difference_table` of a set and what it is compared with; a refusal says why not."""
    try:
        sides = _tokens(source, one, None, layers), _tokens(source, one, other, layers)
        return path_view.difference_table(*sides, layers, top=top)
    except UsageError as error:
        return error


def _tokens(source: opened.Source, one: Chosen, other: Chosen | None, layers: Sequence[int]) -> path_view.RoutedTokens:
    kind, value = other or one
    if kind == "problem":
        return path_view.problem_tokens(opened.open_run(source), _row(source, value), layers)
    every = paths(source)
    if kind == REST:
        left_out = (one[0], str(_row(source, one[1]))) if one[0] == "problem" else one
        return every.tokens.only(path_view.outside(every, *left_out))
    return every.tokens.only(path_view.members(every, kind, value))


def _row(source: opened.Source, problem: str) -> int:
    return opened.problems(source)["sequence_id"].tolist().index(problem)
