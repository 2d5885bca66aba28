"""How the work is spread over the experts of each layer, of the whole run or of one family of problems."""

import opened
import pandas as pd
import streamlit as st
from address import choose, complete
from exhibit import figure, heading, refusal, table
from page_html import block, element

from ling_probe import charts
from ling_probe.analysis import ANALYSES
from ling_probe.analysis.load_curves import beyond_balanced, idle_experts, loads_with_bias
from ling_probe.errors import UsageError
from ling_probe.run import Run

# Comments, for Streamlit would print a string that stands alone.
ALL = "all"


def choose_family(curves: pd.DataFrame) -> str:
    families = [ALL, *(name for name in curves["family"].unique() if name != ALL)]
    told = {ALL: "all problems", "": "unnamed"}
    return choose("Family", "family", families, format_func=lambda name: told.get(name, name), filters=True)


def show_loads(run: Run, curves: pd.DataFrame) -> None:
    outside, low, high = beyond_balanced(curves)
    heading(
        ANALYSES["expert_load"].question,
        f"Load over the even share. {outside:,} of {len(curves):,} experts lie outside {low:.2f} to {high:.2f} times the even "
        "share, where 95 % of the experts of balanced routers lie after as many tokens.",
    )
    shown = charts.load_heatmap(curves, group_size=run.spec.group_size)
    figure(shown, name="loads", question=ANALYSES["expert_load"].question, data=curves)


def show_curves(curves: pd.DataFrame, family: str) -> None:
    analysis = ANALYSES["load_curve"]
    heading(analysis.question, analysis.method)
    figure(charts.lorenz_curves(curves, family=family), name="load_curve", question=analysis.question, data=curves)


def show_measures(source: opened.Source, family: str) -> None:
    analysis, answer = ANALYSES["load_balance"], opened.table(source, "load_balance")
    heading(analysis.question, analysis.method)
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    rows = answer[answer["family"] == family]
    figure(charts.balance_lines(answer, family=family), name="load_balance", question=analysis.question, data=rows)


def show_idle(curves: pd.DataFrame) -> None:
    idle = idle_experts(curves)
    heading(
        "Which experts do next to nothing?",
        f"{int(idle['dead'].sum()):,} experts were never chosen (dead), {int((~idle['dead']).sum()):,} more less than a tenth "
        "as often as the even share (rare).",
    )
    if len(idle):
        table(idle, name="idle-experts")


def show_coverage(source: opened.Source) -> None:
    analysis, answer = ANALYSES["coverage"], opened.table(source, "coverage")
    heading(analysis.question, f"{analysis.method} Of all problems.")
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    figure(charts.coverage_curves(answer), name="coverage", question=analysis.question, data=answer)


def show_bias(run: Run, curves: pd.DataFrame) -> None:
    question = "Do the experts that the bias helps do more of the work?"
    try:
        rows = loads_with_bias(run, curves)
    except UsageError as error:
        heading(question)
        refusal(error)
        return
    layers = rows.drop_duplicates("layer")
    told = ", ".join(f"{row.rank_correlation:+.2f} in layer {row.layer}" for row in layers.itertuples())
    heading(
        question,
        "The router adds a bias to each expert's score, to choose only. A training that balances by it raises the bias of "
        f"experts that are chosen too rarely. Of all problems. Rank correlation of bias and load: {told}.",
    )
    figure(charts.bias_against_load(rows), name="bias", question=question, data=rows)


@st.fragment
def show_family(source: opened.Source, run: Run, answer: pd.DataFrame) -> None:
    """What another family changes; the rest of the page stays as it is drawn."""
    family = choose_family(answer)
    complete()
    curves = answer[answer["family"] == family]
    show_loads(run, curves)
    show_curves(curves, family)
    show_measures(source, family)
    show_idle(curves)


def balance_page(source: opened.Source) -> None:
    run = opened.open_run(source)
    st.html(block(element("h1", "Balance")))
    answer = opened.table(source, "load_curve")
    if isinstance(answer, UsageError):
        complete()
        refusal(answer)
        return
    show_family(source, run, answer)
    show_coverage(source)
    show_bias(run, answer[answer["family"] == ALL])


balance_page(opened.source())
