"""All experts, and one of them: what it is chosen for, with whom, and what it writes towards."""

from typing import Any

import expert_tables
import opened
import pandas as pd
import streamlit as st
from address import choose, chosen, complete, put
from exhibit import figure, heading, refusal
from page_html import block, element, facts, table, token

from ling_probe import charts
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.token_view import visible_text

# Comments, for Streamlit would print a string that stands alone.
ALL = "*"
NEIGHBOURS = 12  # rows of the chart of company
PERCENT = ("load", "weight")
WHOLE = ("layer", "expert", "group", "count")
TEXT = ("label", "family")
MARKS = ("label_sure", "family_sure")
HELP = {
    "load": "Share of its layer's choices.",
    "load_ratio": "Load over the even share.",
    "weight": "Mean share of a token's routing weight when chosen.",
    "label": "The step label it most surely prefers, at equal words.",
    "family": "The family it most surely prefers, at equal words.",
    "saliency": "Mean norm of what it adds when chosen.",
    "logits": "Mean direct attribution to the next token, in logits.",
    "excess": "What changing it and others that prefer a label costs its steps beyond matched experts, nats a token.",
}


def open_expert(cell: Any) -> None:
    layer, expert = cell
    put({"layer": int(layer), "expert": int(expert)})


def show_all(source: opened.Source, run: Run) -> None:
    listed = expert_tables.experts(source)
    values = [name for name in charts.COLOURED if name in listed]
    left, right = st.columns(2)
    with left:
        value = choose("Colour by", "shade", values, format_func=charts.COLOURED.get, filters=True)
    with right:
        layer = choose(
            "Layer",
            "layer",
            [ALL, *run.spec.routed_layers],
            format_func=lambda each: "all" if each == ALL else str(each),
            filters=True,
        )
    complete()
    heading(
        f"{len(listed):,} experts: {charts.COLOURED[value]}", "Click an expert to open it. Red is more than even, blue is less."
    )
    figure(
        charts.expert_map(listed, value), name="experts", question="Experts of every layer", data=listed, on_pick=open_expert
    )
    heading(
        "The list",
        "Choose a row to open its expert; a click on a column's name sorts, and the glass above the list searches. Log2 ratios "
        "are at equal words; low and high are 95 % intervals, q is corrected over all tests of the kind.",
    )
    rows = listed if layer == ALL else listed[listed["layer"] == layer]
    show_list(rows.reset_index(drop=True))


def show_list(rows: pd.DataFrame) -> None:
    def pick() -> None:
        if chosen_rows := st.session_state["expert-list"].selection.rows:
            open_expert(rows.loc[chosen_rows[0], ["layer", "expert"]])

    shown = rows.drop(columns="load_log2")
    st.dataframe(
        shown,
        hide_index=True,
        height=430,
        column_config={name: column(name) for name in shown},
        on_select=pick,
        selection_mode="single-row",
        key="expert-list",
        alt="Every expert with its load and what it prefers",
    )


def column(name: str) -> Any:
    title = name.replace("_", " ")
    if name in TEXT:
        return st.column_config.TextColumn(title, help=HELP.get(name))
    if name in MARKS:
        return st.column_config.CheckboxColumn(title, help="q below 0.05 and the interval above 0.")
    form = "percent" if name in PERCENT else "%d" if name in WHOLE else "%.2g" if name.endswith("_q") else "%.2f"
    return st.column_config.NumberColumn(title, help=HELP.get(name), format=form)


def show_summary(row: dict[str, Any], run: Run) -> None:
    told = {
        "group": f"{row['group']} of {run.spec.n_groups}",
        "choices": f"{row['count']:,}",
        "load": f"{row['load']:.2%} of its layer, {row['load_ratio']:.2f}× the even share (q {row['load_q']:.2g})",
        "weight when chosen": "never chosen" if pd.isna(row["weight"]) else f"{row['weight']:.1%} of the token's",
    }
    for kind in TEXT:
        if not pd.isna(row.get(kind)):
            told[f"most preferred {kind}"] = preference(row, kind)
    if not pd.isna(row.get("saliency")):
        told["adds when chosen"] = f"a norm of {between(row, 'saliency', 'saliency')}"
    if not pd.isna(row.get("logits")):
        told["to the next token"] = f"{between(row, 'logits', 'logits')} logits, directly"
    st.html(block(facts(told)))


def preference(row: dict[str, Any], kind: str) -> str:
    sure = "" if row[f"{kind}_sure"] else ", not significant"
    return f"{row[kind] or 'unnamed'}: log2 {between(row, f'{kind}_log2_ratio', kind)}, q {row[f'{kind}_q']:.2g}{sure}"


def between(row: dict[str, Any], name: str, bounds: str) -> str:
    return f"{row[name]:.2f} ({row[f'{bounds}_low']:.2f} to {row[f'{bounds}_high']:.2f})"


def show_contexts(rows: pd.DataFrame, layer: int, expert: int) -> None:
    heading("Where is its weight largest?", "One token a problem, the largest weight first; the link opens the problem there.")
    if rows.empty:
        st.text("No token chose it.")
    for row in rows.to_dict("records"):
        text = f"{element('span', row['before'])}<b>{token(row['token'])}</b>{element('span', row['after'])}"
        label = element("i", f" {row['label']}") if row["label"] else ""
        wide, narrow = st.columns([3, 1], vertical_alignment="center")
        with wide:
            st.html(block(f'<p class="context">{element("b", format(row["weight"], ".3f"))} {text}{label}</p>'))
        with narrow:
            there = link(problem=row["problem"], layer=layer, token=row["position"], expert=expert)
            st.page_link("views/tokens.py", label=f"Token {row['position']}", query_params=there)


def link(**values: object) -> dict[str, str]:
    return {"run": st.query_params["run"]} | {name: str(value) for name, value in values.items()}


def show_classes(found: dict[str, Any]) -> None:
    for kind, answer in (("label", found["labels"]), ("family", found["families"])):
        asked = "Which steps does it prefer?" if kind == "label" else "Which families does it prefer?"
        heading(
            asked,
            "At equal words, log2 over its rate in the others, with 95 % intervals; grey is not significant (q above 0.05).",
        )
        if isinstance(answer, UsageError):
            refusal(answer)
        elif answer["ci_low"].isna().all():
            st.text("None can be compared: its words are those of one class alone.")
        else:
            figure(charts.preference_dots(answer, kind), name=f"expert-{kind}", question=asked, data=answer)


def show_tokens(answer: pd.DataFrame | UsageError) -> None:
    asked = "Which tokens choose it more than its load explains?"
    heading(
        asked,
        "Found on one half of the problems, measured on the other; 95 % intervals, grey is not significant or untested.",
    )
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    if answer.empty:
        st.text("No token is frequent enough to tell.")
        return
    figure(charts.token_dots(answer, named(answer["name"])), name="expert-tokens", question=asked, data=answer)


def named(texts: pd.Series) -> list[str]:
    """Tokens for an axis: white space visible; ids of one text are numbered."""
    names = texts.map(visible_text)
    again = names.groupby(names).cumcount()
    return [charts.escape(f"“{name}” {place + 1 if place else ''}") for name, place in zip(names, again, strict=True)]


def show_neighbours(answer: pd.DataFrame | UsageError) -> None:
    asked = "Which experts are chosen with it, beyond what groups and loads make?"
    heading(
        asked,
        "Tokens that chose both over the expected, surest first, 95 % intervals. To like the same tokens is not to interact.",
    )
    if isinstance(answer, UsageError):
        refusal(answer)
    else:
        figure(charts.neighbour_dots(answer.head(NEIGHBOURS)), name="expert-neighbours", question=asked, data=answer)


def show_promoted(answer: pd.DataFrame | UsageError) -> None:
    asked = "Which following tokens does it raise, and which lower, against its company?"
    heading(
        asked,
        "Mean direct effect on the logit of the token that followed, less that of the other chosen experts before the same "
        "token; found on one half of the problems, measured on the other.",
    )
    if isinstance(answer, UsageError):
        refusal(answer)
    elif answer.empty:
        st.text("It is chosen too rarely before any one token.")
    else:
        figure(charts.promoted_dots(answer, named(answer["token"])), name="expert-promoted", question=asked, data=answer)


def show_causal(answer: pd.DataFrame | UsageError) -> None:
    heading("What does changing it cost?", "Rise of the loss beyond the same change to matched experts, in nats a token.")
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    rows = [
        (
            f"{row.kind} of {row.together}",
            row.label,
            row.measure,
            f"{row.excess:.4f}",
            f"{row.excess_low:.4f} to {row.excess_high:.4f}",
            f"{row.q:.2g}",
        )
        for row in answer.itertuples()
    ]
    st.html(block(table(["change", "steps", "loss in", "excess", "95 % interval", "q"], rows)))


def show_one(source: opened.Source, run: Run) -> None:
    first, second, third = st.columns(3, vertical_alignment="bottom")
    with first:
        layer = choose("Layer", "layer", run.spec.routed_layers)
    with second:
        expert = choose("Expert", "expert", range(run.spec.n_experts))
    with third:
        st.button("All experts", on_click=put, args=({"expert": None},), icon=":material/arrow_back:")
    complete()
    found = expert_tables.facts(source, layer, expert)
    st.html(block(element("h2", f"Layer {layer}, expert {expert}")))
    show_summary(found["row"], run)
    left, right = st.columns(2)
    with left:
        show_contexts(found["contexts"], layer, expert)
        show_tokens(found["tokens"])
        show_promoted(found["promoted"])
    with right:
        show_classes(found)
        show_neighbours(found["neighbours"])
        show_causal(found["causal"])


def experts_page(source: opened.Source) -> None:
    run = opened.open_run(source)
    st.html(block(element("h1", "Experts")))
    if run.sequences.empty:
        st.info("This run holds no sequences yet.")
        return
    (show_all if chosen("expert") is None else show_one)(source, run)


experts_page(opened.source())
