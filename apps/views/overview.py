"""What ran, how well it did, and where to look first."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import opened
import pandas as pd
import streamlit as st
from address import complete
from exhibit import figure, heading, refusal
from export import report_button
from page_html import block, element, facts, table

from ling_probe import charts
from ling_probe.analysis import ANALYSES, SINGLE
from ling_probe.errors import UsageError
from ling_probe.run import Run


def show_title(run: Run, first: dict[str, Any]) -> None:
    counts = " · ".join(f"{first[name]:,} {name}" for name in ("sequences", "tokens", "steps"))
    st.html(
        block(
            element("h1", f"Routing of {first['model']} on {first['benchmark'] or 'unnamed text'}"),
            element(
                "p", f"{counts} · {run.spec.n_rows} routed layers, {run.spec.top_k} of {run.spec.n_experts} experts a token"
            ),
        )
    )
    if first["state"] != "complete":
        st.warning("This run is not complete; it shows what has been captured so far.")
    if first["interventions"]:
        st.warning("Routing was changed in this run: it does not describe the model as released.")
        st.json(first["interventions"], expanded=False)


def show_answers(first: dict[str, Any]) -> None:
    rows = [
        (
            row["family"] or "unnamed",
            f"{row['correct']:,} of {row['judged']:,}",
            f"{row['share']:.1%}",
            f"{row['ci_low']:.1%} to {row['ci_high']:.1%}",
        )
        for row in first["accuracy"]
    ]
    body = table(["family", "correct", "share", "95 % interval"], rows) if rows else element("p", "No answer was judged.")
    st.html(block(element("h2", "Answers"), body))


def show_verification(verification: dict[str, Any]) -> None:
    if not verification:
        st.html(block(element("h2", "Routing verified at load"), element("p", "The run does not say.")))
        return
    stated = f"{verification.get('differ', '?')} of {verification.get('choices', '?')} differ"
    st.html(
        block(
            element("h2", "Routing verified at load"),
            element("div", stated, class_="big"),
            facts({name.replace("_", " "): value for name, value in verification.items()}),
            element("p", "Choices the model made against what its routing rule gives for the same inputs.", class_="soft"),
        )
    )


def show_chart(name: str, answer: pd.DataFrame | UsageError, run: Run) -> None:
    heading(ANALYSES[name].question, ANALYSES[name].method)
    if isinstance(answer, UsageError):
        refusal(answer)
        return
    for drawn in charts.FIGURES[name](answer, run.spec):
        figure(drawn, name=name, question=ANALYSES[name].question, data=answer)


def card(row: dict[str, Any]) -> str:
    return block(
        element("h3", f"Layer {row['layer']}, expert {row['expert']} prefers “{row['label']}”"),
        element("div", times(row["log2_ratio"]), class_="big"),
        facts(
            {
                "95 % interval": f"{times(row['ci_low'])} to {times(row['ci_high'])}",
                "corrected p": f"{row['q']:.3g}",
                "words included": times(row["raw_log2_ratio"]),
            }
        ),
        kind="card",
    )


def times(log2: float) -> str:
    return f"{2.0**log2:.2f}×"


def show_specialised(source: opened.Source, first: dict[str, Any]) -> None:
    st.html(block(element("h2", "The most specialised experts"), element("p", first["specialised_note"])))
    if not first["specialised"]:
        show_tokens_instead(first)
        return
    st.html(block(block(*map(card, first["specialised"]), kind="cards")))
    best = first["specialised"][0]
    st.text(
        f"Look first at layer {best['layer']}, expert {best['expert']}: steps labelled “{best['label']}” choose it "
        f"{times(best['log2_ratio'])} as often as the same words do in other steps at the same place. "
        "The problem with most such steps shows it."
    )
    there = link(problem=opened.example(source, best["label"]), layer=best["layer"], expert=best["expert"])
    st.page_link("views/tokens.py", label="See it token by token", icon=":material/arrow_forward:", query_params=there)
    for row in first["specialised"]:
        st.page_link(
            "views/experts.py",
            label=f"All about layer {row['layer']}, expert {row['expert']}",
            icon=":material/arrow_forward:",
            query_params=link(layer=row["layer"], expert=row["expert"]),
        )


def show_tokens_instead(first: dict[str, Any]) -> None:
    some_wrong = any(row["correct"] < row["judged"] for row in first["accuracy"])
    which = "one that was answered wrongly" if some_wrong else "any"
    st.text(f"Look first at the tokens of a problem: open {which}.")
    there = link(answers="wrong") if some_wrong else link()
    st.page_link("views/tokens.py", label="See it token by token", icon=":material/arrow_forward:", query_params=there)


def show_findings(source: opened.Source) -> None:
    index = opened.findings(source)
    heading(
        "What was found",
        f"The verdict on each question that was asked of this run so far: {len(index)} of {len(SINGLE)}. Writing the whole "
        "report, below, asks the others.",
    )
    for path, (title, names) in SHOWN_ON.items():
        rows = index[index["analysis"].isin(names)]
        if not rows.empty and (HERE / path).is_file():
            st.html(block(findings_list(rows.to_dict("records"))))
            st.page_link(path, label=f"Open {title}", icon=":material/arrow_forward:", query_params=link())
    rest = index[~index["analysis"].isin([name for _, names in SHOWN_ON.values() for name in names])]
    if not rest.empty:
        with st.expander("What no page shows; the report does", key="rest"):
            st.html(block(findings_list(rest.to_dict("records"))))


def findings_list(rows: list[dict[Hashable, Any]]) -> str:
    pairs = (
        element("dt", row["verdict"]) + f"<dd>{element('b', row['question'])} {element('span', row['finding'])}</dd>"
        for row in rows
    )
    return f"<dl>{''.join(pairs)}</dl>"


HERE = Path(__file__).parents[1]
SHOWN_ON = {
    "views/specialisation.py": ("Specialisation", ("label_specialisation", "family_specialisation", "expert_clusters")),
    "views/balance.py": ("Balance", ("expert_load", "load_balance", "load_curve", "coverage")),
    "views/paths.py": ("Paths", ("layer_transition",)),
    "views/experts.py": ("Experts", ("expert_saliency", "enrichment", "coactivation", "causal_effects")),
}


def link(**values: object) -> dict[str, str]:
    return {"run": st.query_params["run"]} | {name: str(value) for name, value in values.items()}


def overview(source: opened.Source) -> None:
    complete()
    run = opened.open_run(source)
    first = opened.headline(source)
    show_title(run, first)
    specialised = st.container()
    left, right = st.columns(2)
    with left:
        show_answers(first)
    with right:
        show_verification(first["verification"])
    for name in ("load_balance", "expert_load"):
        show_chart(name, opened.table(source, name), run)
    found = st.container()
    heading("Take it all along", "Every analysis of this run on one page that can be mailed, with its tables as files.")
    report_button(source)
    with specialised:
        opened.table(source, "label_specialisation")
        show_specialised(source, opened.headline(source, "label_specialisation"))
    with found:
        show_findings(source)


overview(opened.source())
