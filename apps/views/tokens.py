"""One problem, token by token: which expert leads where, and one token through all layers."""

from typing import Any

import opened
import pandas as pd
import streamlit as st
from address import choose, chosen, complete, put
from exhibit import figure, heading, refusal
from page_html import block, element, facts, markdown, table, token, verdict
from problem_choice import choose_problem, matching_problems
from token_strip import token_strip

from ling_probe import token_view
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.token_view import colourings

# Comments, for Streamlit would print a string that stands alone.
WINDOW = 2000  # tokens shown at a time
COLOURS = {
    "expert": "leading expert",
    "entropy": "router entropy",
    "margin": "margin of the choice",
    "loss": "next-token loss",
    "agreement": "agreement with another run",
}
QUESTIONS = {
    "expert": ("Which expert of layer {layer} leads each token?", "The leading expert is the one with the largest weight."),
    "entropy": ("How evenly does the router of layer {layer} see its experts?", "The darker, the less it prefers any."),
    "margin": ("How near was each choice of layer {layer} to another?", "The lighter, the nearer."),
    "loss": ("What did the model not expect?", "The darker a token, the less the model expected the one after it."),
    "agreement": ("Where does another run choose otherwise in layer {layer}?", "The lighter, the fewer experts in common."),
}
USE = "Point at a token for all its experts; click it, or press Enter, to pin it; the arrow keys move."


def number(name: str, limit: int) -> int | None:
    """A number from 0 to below the limit in the address, if there is one."""
    text = chosen(name)
    if text is None:
        return None
    if text.isdecimal() and int(text) < limit:
        return int(text)
    st.warning(markdown(f"no {name} {text!r} here; it is a number from 0 to {limit - 1}"))
    return None


def choose_colour(run: Run) -> tuple[str, opened.Source | None]:
    """What tokens are coloured by, and the other run of an agreement."""
    others = opened.others()
    left, right = st.columns(2)
    with left:
        offered = colourings(run, compared=bool(others))
        by = choose("Colour", "colour", offered, format_func=COLOURS.__getitem__, clears=("against",), filters=True)
    if by != "agreement":
        return by, None
    with right:
        return by, opened.other(choose("Another run", "against", others))


def show_strip(source: opened.Source, run: Run, sequence: int, layer: int) -> int | None:
    """Draw the tokens and return the position of the pinned one."""
    tokens = opened.tokens(source, sequence, layer)
    by, against = choose_colour(run)
    start = 0
    if len(tokens) > WINDOW:
        starts = range(0, len(tokens), WINDOW)
        start = choose("Tokens from position", "from", starts)
    complete()
    pinned, marked = number("token", len(tokens)), number("expert", run.spec.n_experts)
    legend = token_view.leading_experts(tokens) if by == "expert" else opened.scale(source, sequence, layer, by, against)
    asked, how = QUESTIONS[by]
    heading(asked.format(layer=layer), f"{how} {USE}")
    if isinstance(legend, UsageError):
        refusal(legend)
        legend = token_view.leading_experts(tokens)
    token_strip(
        tokens.iloc[start : start + WINDOW],
        legend,
        view=f"{source[1]}/{sequence}/{layer}/{start}/{by}/{against}",
        pinned=pinned,
        marked=marked,
        on_pin=lambda position: put({"token": position}),
        on_mark=lambda expert: put({"expert": expert}),
    )
    if marked is not None:
        there = {"run": st.query_params["run"], "layer": str(layer), "expert": str(marked)}
        st.page_link("views/experts.py", label=f"All about layer {layer}, expert {marked}", query_params=there)
    return pinned


def show_pinned(source: opened.Source, sequence: int, layer: int, position: int) -> None:
    row = opened.tokens(source, sequence, layer).iloc[position]
    rows = opened.layers(source, sequence, position)
    step = f"step {row['step'] + 1} “{row['label']}” ({verdict(row['step_correct'])})" if row["step"] >= 0 else "in no step"
    values = {
        "segment": row["segment"],
        "step": step,
        "next-token loss": "none, it is the last" if pd.isna(row["loss"]) else f"{row['loss']:.3f} nats",
    }
    title = f"<h2>Token {token(row['token'])} at position {position}, through all layers</h2>"
    st.html(block(title, facts(values)))
    question = f"Experts and weights of the token at position {position} in every layer"
    figure(token_view.layers_figure(rows), name="layers", question=question, data=rows)
    ranks = [f"{place}." for place in range(1, rows["rank"].nunique() + 1)]
    lines = [
        [each, *(f"{choice.expert} ({choice.weight:.3f})" for choice in choices.itertuples())]
        for each, choices in rows.groupby("layer")
    ]
    st.html(block(table(["layer", *ranks], lines, caption="Chosen experts, largest weight first; the weight in brackets")))


def show_problem(values: dict[str, Any]) -> None:
    shown = {
        "family": values["family"] or "unnamed",
        "expected answer": values["answer"] or "none",
        "the model's answer": f"{values['predicted'] or 'none'} ({verdict(values['correct'])})",
    }
    st.html(block(facts(shown)))


def tokens_page(source: opened.Source) -> None:
    run = opened.open_run(source)
    st.html(block(element("h1", "Tokens")))
    if (problems := opened.problems(source)).empty:
        st.info("This run holds no sequences yet.")
        return
    first, second, third = st.columns(3)
    with third:
        layer = choose("Layer", "layer", run.spec.routed_layers)
    sequence = choose_problem(matching_problems(problems, first, second))
    show_problem(opened.facts(source, sequence))
    if (position := show_strip(source, run, sequence, layer)) is not None:
        show_pinned(source, sequence, layer, position)


tokens_page(opened.source())
