"""What experts specialise in: kinds of steps or families of problems, at equal words, and whether they fall into kinds."""

from functools import partial

import opened
import pandas as pd
import streamlit as st
from address import choose, complete
from exhibit import figure, heading, refusal, table
from expert_link import follow, open_expert, there
from page_html import block, element

from ling_probe import charts
from ling_probe.analysis import ANALYSES, surest_first
from ling_probe.analysis.clusters import clustering_told
from ling_probe.analysis.profile_order import ordered_profiles
from ling_probe.analysis.question import DISCOVERY
from ling_probe.errors import UsageError
from ling_probe.run import Run

# Comments, for Streamlit would print a string that stands alone.
ALL = "all"
BY = {"label": "kinds of steps", "family": "families of problems"}
SHOWN = 500  # rows of the table
COLUMNS = ["log2_ratio", "ci_low", "ci_high", "q", "raw_log2_ratio", "tokens", "replicated"]


def choose_layer(run: Run) -> int | None:
    options = [ALL, *run.spec.routed_layers]
    layer = choose(
        "Layer", "layer", options, format_func=lambda each: "all layers" if each == ALL else f"layer {each}", filters=True
    )
    return None if layer == ALL else int(layer)


def show_profiles(rows: pd.DataFrame, kind: str, layer: int | None) -> None:
    question = f"Which experts prefer which {BY[kind]}, at equal words?"
    shown = ordered_profiles(rows, kind, layer=layer)
    which = "Experts with a significant preference or aversion" if layer is None else f"All experts of layer {layer}"
    click = " Click an expert to open its page." if there() else ""
    heading(
        question,
        f"{which}, alike ones side by side. Red is chosen more often than the same words choose it elsewhere, blue less; faded "
        f"cells are not significant (q 0.05 or more).{click}",
    )
    if shown.empty:
        st.text("No expert has a preference beyond chance. Choose a layer to see all of its experts.")
        return
    figure(charts.profile_heatmap(shown, kind), name="profiles", question=question, data=shown, on_pick=open_expert)


def show_where(rows: pd.DataFrame, kind: str) -> None:
    names = sorted(rows[kind].unique())
    name = choose(kind.capitalize(), kind, names, format_func=lambda each: each or "unnamed")
    question = f"Where are the experts that prefer “{name}”?"
    heading(question, "Layers by experts; what is not significant is left blank.")
    mine = rows[rows[kind] == name]
    if not mine["q"].lt(DISCOVERY).any():
        st.text("None does so beyond chance.")
        return
    figure(charts.specialisation_heatmap(rows, name), name="where", question=question, data=mine)


def show_kinds(source: opened.Source, layer: int | None) -> None:
    analysis, answer = ANALYSES["expert_clusters"], opened.table(source, "expert_clusters")
    heading(analysis.question, analysis.method)
    if isinstance(answer, UsageError):
        complete()
        refusal(answer)
        return
    view = choose("View", "view", list(answer["view"].unique()), format_func=VIEWS.get)
    complete()
    if not (told := clustering_told(answer, view, layer)):
        st.text("Experts of different layers keep no company; choose a layer.")
        return
    st.text(told)
    drawn = charts.cluster_map(answer, view=view, layer=layer)
    chosen = answer[(answer["view"] == view) & (answer["layer"].eq(layer) | (layer is None))]
    figure(drawn, name="clusters", question=f"{analysis.question} By {view}", data=chosen, on_pick=open_expert)


VIEWS = {
    "profile": "profile: what they prefer",
    "coactivation": "co-activation: the company they keep",
    "gate": "gate: what they listen to",
    "output": "output: what they write",
}


def show_table(rows: pd.DataFrame, kind: str, layer: int | None) -> None:
    here = surest_first(rows if layer is None else rows[rows["layer"] == layer])
    heading("The table", f"The surest first, at most {SHOWN} rows; the export has all {len(here):,}. Effects are log2 ratios.")
    table(here[["layer", "expert", kind, *COLUMNS]].head(SHOWN), name=f"{kind}_specialisation", data=here)


def specialisation_page(source: opened.Source) -> None:
    follow()
    run = opened.open_run(source)
    st.html(block(element("h1", "Specialisation")))
    left, right = st.columns(2)
    with left:
        kind = choose("By", "by", list(BY), format_func=BY.get, control=partial(st.radio, horizontal=True), filters=True)
    with right:
        layer = choose_layer(run)
    answer = opened.table(source, f"{kind}_specialisation")
    if isinstance(answer, UsageError):
        refusal(answer)
    else:
        st.text(ANALYSES[f"{kind}_specialisation"].finding(answer).sentence)
        show_profiles(answer, kind, layer)
        show_where(answer, kind)
        show_table(answer, kind, layer)
    show_kinds(source, layer)


specialisation_page(opened.source())
