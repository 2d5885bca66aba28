"""One problem, step by step: through which states its routing passes, which experts its steps take, what they add."""

import opened
import pandas as pd
import state_tables
import streamlit as st
from address import choose, complete
from exhibit import figure, heading, refusal
from page_html import block, element, facts, table, verdict
from problem_choice import choose_problem, matching_problems

from ling_probe import charts
from ling_probe.errors import UsageError
from ling_probe.state_view import StateTables, state_summary

LEAST = (0.05, 0.1, 0.2, 0.3, 0.5)
UNTESTED = "none for sure"


def show_timeline(source: opened.Source, sequence: int, tables: StateTables) -> None:
    shown = state_tables.problem(source, sequence)
    question = "Which states does routing pass through, and where does it change?"
    method = (
        "States are learnt from routing alone, on half of the problems. A boundary by routing is a peak of the distance "
        "between the experts of 4 tokens and the 4 before; by tokens alone, the same from what each word makes of its routing. "
        "Lines: loss of each token in nats; where logits were kept, entropy of the router as a share of its most, and margin "
        "of its choice, means over layers."
    )
    heading(question, method)
    figure(
        charts.timeline(shown.tokens, shown.steps, shown.boundaries, shown.lines),
        name="timeline",
        question=question,
        data=shown.tokens,
    )
    if not tables.thresholds:
        st.text("Boundaries are not predicted: this run has too few problems with steps.")


def show_steps(source: opened.Source, sequence: int) -> None:
    heading(
        "What does each step say, and which experts does it take?",
        "Experts that surely prefer the step's label and were chosen in it.",
    )
    found = state_tables.steps(source, sequence)
    if isinstance(found, UsageError):
        refusal(found)
        return
    rows = [
        (
            row["step"] + 1,
            row["label"],
            row["text"].strip(),
            verdict(row["correct"]),
            row["tokens"],
            "none" if pd.isna(row["loss"]) else f"{row['loss']:.3f}",
            "; ".join(map(named, row["experts"])) or UNTESTED,
        )
        for row in found.to_dict("records")
    ]
    header = ["step", "label", "text", "judged", "tokens", "loss in nats", "most selective experts"]
    st.html(
        block(
            table(
                header,
                rows,
                caption="In brackets how often they are chosen against the same words elsewhere, with its 95 % interval",
            )
        )
    )


def named(expert: dict[str, float]) -> str:
    fold, low, high = (f"{2.0 ** expert[name]:.2f}" for name in ("log2_ratio", "ci_low", "ci_high"))
    return f"layer {expert['layer']}, expert {expert['expert']} ({fold}×, {low} to {high})"


def show_attribution(source: opened.Source, sequence: int) -> None:
    question = "What did experts add directly to what was written?"
    heading(
        question,
        "Sum over the chosen experts of a layer, mean over the tokens of the step that was being written; direct means "
        "through the final norm and the head alone.",
    )
    found = state_tables.attribution(source, sequence)
    if isinstance(found, UsageError):
        refusal(found)
        return
    figure(charts.attribution_map(found), name="attribution", question=question, data=found)


def show_states(tables: StateTables) -> None:
    heading(
        "What does each state go with?", "What its tokens are of more often than all tokens, on problems that fitted nothing."
    )
    rows = [
        (
            row["state"],
            f"{row['share']:.1%}",
            *(", ".join(row[name]) or "none" for name in ("labels", "families")),
            " ".join(map(repr, row["tokens"])),
            "; ".join(row["experts"]),
        )
        for row in state_summary(tables.profiles).to_dict("records")
    ]
    st.html(block(table(["state", "share", "labels", "families", "tokens", "experts"], rows)))
    question = "Where does routing go when a state ends?"
    heading(question, "From the states on the left to those on the right, as thick as the changes are many.")
    least = choose("Show chances from", "least", LEAST, format_func=lambda share: f"{share:.0%}")
    figure(charts.order_sankey(tables.transitions, least=least), name="order", question=question, data=tables.transitions)


def show_answers(tables: StateTables) -> None:
    question = "Do wrong solutions pass through other states?"
    heading(
        question,
        "Families that have both, right solutions weighted to have families as wrong ones have; whiskers are 95 % intervals "
        "over problems.",
    )
    if tables.answers.empty:
        st.text("Not applicable: no family of this run has both right and wrong answers.")
        return
    figure(charts.share_bars(tables.answers), name="answers", question=question, data=tables.answers)


def steps_page(source: opened.Source) -> None:
    st.html(block(element("h1", "Steps")))
    if (problems := opened.problems(source)).empty:
        st.info("This run holds no sequences yet.")
        return
    left, right = st.columns(2)
    sequence = choose_problem(matching_problems(problems, left, right))
    about = opened.facts(source, sequence)
    st.html(
        block(
            facts(
                {
                    "family": about["family"] or "unnamed",
                    "expected answer": about["answer"] or "none",
                    "the model's answer": f"{about['predicted'] or 'none'} ({verdict(about['correct'])})",
                }
            )
        )
    )
    tables = state_tables.states(source)
    if isinstance(tables, UsageError):
        refusal(tables)
        complete()
    else:
        show_timeline(source, sequence, tables)
    show_steps(source, sequence)
    show_attribution(source, sequence)
    if isinstance(tables, StateTables):
        show_states(tables)
        complete()
        show_answers(tables)


steps_page(opened.source())
