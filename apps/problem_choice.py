"""Which problem a page shows, chosen among those of a family and correctness."""

import pandas as pd
import streamlit as st
from address import choose, chosen, put
from page_html import verdict
from streamlit.delta_generator import DeltaGenerator

NEAR = 200
"""Problems offered on each side of the one shown."""
ALL = "*"
PINNED = ("from", "token")


def matching_problems(problems: pd.DataFrame, left: DeltaGenerator, right: DeltaGenerator) -> pd.DataFrame:
    """The problems of the chosen family and correctness, which the reader chooses in two columns."""
    families = [ALL, *sorted(problems["family"].unique())]
    verdicts = problems["correct"].map(verdict)
    clears = ("problem", *PINNED)
    with left:
        family = choose("Family", "family", families, format_func=all_or_named, clears=clears, filters=True)
    with right:
        found = [ALL, *sorted(verdicts.unique())]
        answers = choose("Answers", "answers", found, format_func=all_or_named, clears=clears, filters=True)
    return problems[(problems["family"].eq(family) | (family == ALL)) & (verdicts.eq(answers) | (answers == ALL))]


def all_or_named(name: str) -> str:
    return "all" if name == ALL else name or "unnamed"


def choose_problem(matching: pd.DataFrame) -> int:
    """Row in `Run.sequences` of the problem to show."""
    if matching.empty:
        st.info("No problem of this family has such an answer.")
        st.stop()
    rows = dict(zip(matching["sequence_id"], matching.index, strict=True))
    ids, asked = list(rows), chosen("problem")
    place = ids.index(asked) if asked in rows else 0
    wide, narrow = st.columns([3, 2], vertical_alignment="bottom")
    with wide:
        shown = choose(
            "Problem",
            "problem",
            ids[max(0, place - NEAR) : place + NEAR],
            format_func=lambda name: f"{name} ({verdict(matching['correct'][rows[name]])})",
            clears=PINNED,
        )
    with narrow, st.container(horizontal=True, vertical_alignment="center"):
        st.button("Previous", on_click=go_to, args=(ids[max(0, place - 1)],), disabled=place == 0)
        st.text(f"{place + 1:,} of {len(ids):,}")
        st.button("Next", on_click=go_to, args=(ids[min(place + 1, len(ids) - 1)],), disabled=place + 1 == len(ids))
    return int(rows[shown])


def go_to(problem: str) -> None:
    put({"problem": problem} | dict.fromkeys(PINNED))
