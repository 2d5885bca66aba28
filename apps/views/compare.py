"""The open run beside another: what both answered, which experts both chose, and where they part, token by token."""

from html import unescape

import compared
import opened
import pandas as pd
import streamlit as st
from address import choose, chosen, complete
from exhibit import figure, heading, refusal
from page_html import block, disagreement, element, markdown
from page_html import table as html_table

from ling_probe import charts
from ling_probe.analysis import ANALYSES
from ling_probe.compare_view import shared_problems
from ling_probe.errors import UsageError
from ling_probe.run import Run

# Comments, for Streamlit would print a string that stands alone.
NEAR = 200  # problems offered on each side of the one shown
WINDOW = 2000  # tokens shown


def show_answers(source: opened.Source, other: opened.Source, name: str) -> None:
    rows = compared.answers(source, other)
    heading(
        "Which run answers better?",
        "Shares of correct answers with their 95 % intervals; p is an exact test on the problems that both answered (McNemar).",
    )
    if not rows[["judged_here", "judged_there"]].any(axis=None):
        st.text("No answer was judged in either run.")
        return
    lines = [
        [
            row.family or "unnamed",
            share(row.share_here, row.low_here, row.high_here),
            share(row.share_there, row.low_there, row.high_there),
            f"{row.only_here:,}",
            f"{row.only_there:,}",
            f"{row.shared:,}",
            "" if pd.isna(row.p) else f"{row.p:.3g}",
        ]
        for row in rows.itertuples()
    ]
    header = ["family", "this run", name, "right here alone", "right there alone", "problems of both", "p"]
    st.html(block(html_table(header, lines)))


def share(value: float, low: float, high: float) -> str:
    return "none judged" if pd.isna(value) else f"{value:.1%} ({low:.1%} to {high:.1%})"


def show_comparison(name: str, answer: pd.DataFrame | UsageError) -> None:
    analysis = ANALYSES[name]
    heading(analysis.question, analysis.method)
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    st.text(analysis.finding(answer).sentence)
    for number, drawn in enumerate(FIGURES[name](answer)):
        question = unescape(drawn.layout.title.text)
        if question != analysis.question:
            st.html(block(element("h3", question)))
        figure(drawn, name=f"{name}-{number}", question=question, data=answer)


FIGURES = {
    "route_agreement": lambda table: [
        charts.agreement_lines(table),
        *([charts.margin_lines(table)] if (table["margin"] != "all").any() else []),
    ],
    "load_shift": lambda table: [
        *([charts.shift_heatmap(table, against=str(table["against"].iloc[0]))] if (table["q"] < 0.05).any() else []),
        charts.shift_bars(table),
    ],
    "router_saturation": lambda table: [charts.saturation_curves(table)],
}


def show_tokens(source: opened.Source, other: opened.Source, layer: int, name: str) -> None:
    here, there = opened.problems(source), opened.problems(other)
    ids, asked = shared_problems(here, there), chosen("problem")
    if not ids:
        complete()
        return
    place = ids.index(asked) if asked in ids else 0
    problem = choose("Problem", "problem", ids[max(0, place - NEAR) : place + NEAR])
    complete()
    heading(
        f"Where do the runs part in layer {layer}?",
        "The stronger a token's colour, the fewer of its experts both runs chose; no colour is the same choice. Point at a "
        "token for the experts of either.",
    )
    rows = (int((table["sequence_id"] == problem).to_numpy().argmax()) for table in (here, there))
    answer = compared.tokens(source, other, tuple(rows), layer)
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    st.html(block(disagreement(answer.head(WINDOW), name)))
    if len(answer) > WINDOW:
        st.text(f"The first {WINDOW:,} of {len(answer):,} tokens.")
    for run, label in ((st.query_params["run"], "this run"), (name, name)):
        address = {"run": run, "problem": problem, "layer": str(layer)}
        told = f"These tokens in {label}"
        st.page_link("views/tokens.py", label=markdown(told), icon=":material/arrow_forward:", query_params=address)


def show_saturation(source: opened.Source, found: list[str]) -> None:
    if checkpoints := compared.checkpoints(source, tuple(found)):
        show_comparison("router_saturation", compared.comparison(source, checkpoints, "router_saturation"))


def compare_page(source: opened.Source) -> None:
    run: Run = opened.open_run(source)
    st.html(block(element("h1", "Compare")))
    found = opened.others()
    if not found:
        complete()
        refusal(UsageError("there is no other run in this folder; start the explorer with a folder that holds both"))
        return
    left, right = st.columns(2)
    with left:
        name = choose("Against", "against", found, clears=("problem",))
    with right:
        layer = choose("Layer", "layer", run.spec.routed_layers)
    other = opened.other(name)
    agreement = compared.comparison(source, (other,), "route_agreement")
    shift = compared.comparison(source, (other,), "load_shift")
    if isinstance(agreement, UsageError) and isinstance(shift, UsageError):
        complete()
        refusal(shift)
        return
    show_answers(source, other, name)
    show_comparison("route_agreement", agreement)
    show_comparison("load_shift", shift)
    show_tokens(source, other, layer, name)
    show_saturation(source, found)


compare_page(opened.source())
