"""Which way the tokens of a set go through the layers, and where those of another go instead."""

import opened
import pandas as pd
import path_tables
import streamlit as st
from address import choose, chosen, complete, put
from exhibit import figure, heading, refusal
from page_html import block, element
from path_tables import ALL, REST, Chosen

from ling_probe import charts, path_view
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.token_view import visible_text

# Comments, for Streamlit would print a string that stands alone.
NOTHING = "nothing"
ONE_OF = ("problem", "text")  # kinds whose members are too many for one box
OFFERED = 400  # problems or texts in a box
FIRST_LAYERS, MOST_LAYERS = 4, 6  # shown at first, and at most
SHOWN = 50  # rows of the list
COLUMNS = {
    "layer": ("layer", "%d"),
    "expert": ("expert", "%d"),
    "next_layer": ("next layer", "%d"),
    "next_expert": ("next expert", "%d"),
    "share": ("share", "percent"),
    "ci_low": ("low", "percent"),
    "ci_high": ("high", "percent"),
    "expected": ("if independent", "percent"),
    "log2_lift": ("log2 lift", "%.2f"),
    "lift_low": ("low", "%.2f"),
    "lift_high": ("high", "%.2f"),
}
METHOD = (
    "A band is as wide as the share of the set's tokens that go from an expert to one of the next layer. Red bands are taken "
    "more often than if the layers were independent (the product of both experts' shares), blue ones less often, grey ones not "
    "surely either. Words are part of this: a word that routes alike in two layers ties them together."
)
DIFFERENCE_METHOD = (
    "Share of the first set's tokens that take a way less the share of the second's, with 95 % intervals from a jackknife over "
    "blocks of problems; q corrected over all ways that could be tested. Sets of other words differ for their words."
)


def choose_set(label: str, name: str, paths: path_view.Paths, before: list[str], *, prefix: str = "") -> str:
    """A box of all sets, as "kind:value"."""
    kinds = [f"label:{each}" for each in paths.labels] + [f"family:{each}" for each in paths.families]
    return choose(label, name, [*before, *kinds, *ONE_OF], format_func=told, clears=[f"{prefix}{kind}" for kind in ONE_OF])


def told(name: str) -> str:
    """How a set reads.

    >>> told("label:add"), told("rest")
    ('steps: add', 'the rest')
    """
    kind, _, value = name.partition(":")
    simple = {ALL: "all tokens", REST: "the rest", NOTHING: "nothing", "problem": "one problem …", "text": "a token's text …"}
    if kind in ("problem", "text") and value:
        return f"{kind} {visible_text(value)}"
    return simple.get(kind) or f"{'steps' if kind == 'label' else 'family'}: {value or 'unnamed'}"


def as_set(source: opened.Source, paths: path_view.Paths, name: str, *, prefix: str = "") -> Chosen:
    """A set chosen in a box; one problem or one text is chosen in a second."""
    kind, _, value = name.partition(":")
    if kind == "problem":
        ids = opened.problems(source)["sequence_id"].tolist()
        return kind, choose("Problem", f"{prefix}problem", offered(ids, f"{prefix}problem"))
    if kind == "text":
        texts = offered(list(dict.fromkeys(paths.texts)), f"{prefix}text")
        return kind, choose("Token", f"{prefix}text", texts, format_func=visible_text)
    return kind, value


def offered(values: list[str], name: str) -> list[str]:
    """The first values, and the one that the address names wherever it stands."""
    asked = chosen(name)
    return values[:OFFERED] + ([asked] if asked in values[OFFERED:] else [])


def choose_sets(source: opened.Source, paths: path_view.Paths) -> tuple[Chosen, Chosen | None]:
    left, right = st.columns(2)
    with left:
        of = choose_set("Tokens of", "of", paths, [ALL])
        one = as_set(source, paths, of)
    with right:
        beside = choose_set("Compared with", "beside", paths, [NOTHING, REST, ALL], prefix="beside-")
        other = None if beside == NOTHING else as_set(source, paths, beside, prefix="beside-")
    return one, other


def choose_layers(run: Run) -> tuple[tuple[int, ...], int]:
    """Neighbouring layers to show, and how many experts of each token count."""
    layers, k = run.spec.routed_layers, run.spec.top_k
    first, second, third = st.columns(3)
    with first:
        start = choose("First layer", "layer", layers[:-1])
    with second:
        numbers = range(2, min(len(layers), MOST_LAYERS) + 1)
        number = choose("Layers shown", "layers", numbers, default=min(FIRST_LAYERS, numbers[-1]))
    with third:
        tops = list(dict.fromkeys([1, min(2, k), min(4, k), k]))
        top = choose(
            "Experts counted",
            "top",
            tops,
            format_func=lambda top: "the leading one" if top == 1 else f"the first {top}, by weight",
        )
    place = layers.index(start)
    return tuple(layers[place : place + number]), top


def link_label_to_set(paths: path_view.Paths) -> None:
    """Another page's link names a label."""
    label = chosen("label")
    if chosen("of") is None and label in paths.labels:
        put({"of": f"label:{label}"})


def show_flows(table: pd.DataFrame | UsageError, name: str, least: float, *, which: str) -> None:
    if isinstance(table, UsageError):
        refusal(table)
        return
    drawn = path_view.drawn_flows(table, least=least)
    shown, reach = path_view.counted(table, least)
    said = f"{table['tokens'].iloc[0]:,} tokens of {table['problems'].iloc[0]:,} problems. "
    said += f"{shown:,} of {reach:,} flows that reach {least:.2%} are drawn; the rest is “others”."
    st.html(block(element("h3", told(name)), element("p", said, class_="soft")))
    asked = f"Flows between layers: {told(name)}"
    figure(charts.path_sankey(drawn, told(name)), name=f"paths-{which}", question=asked, data=table)


def show_list(table: pd.DataFrame) -> None:
    heading("The largest flows", "Share and lift with their 95 % intervals. Choose a row to look at its experts.")
    rows = table.nlargest(SHOWN, "share").reset_index(drop=True)
    config = {name: st.column_config.NumberColumn(title, format=form) for name, (title, form) in COLUMNS.items()}
    event = st.dataframe(
        rows[list(COLUMNS)], hide_index=True, column_config=config, on_select="rerun", selection_mode="single-row", key="flows",
        alt="The largest flows with their intervals", height=300,
    )  # fmt: skip
    if event.selection.rows:
        row = rows.iloc[event.selection.rows[0]]
        for layer, expert in ((row["layer"], row["expert"]), (row["next_layer"], row["next_expert"])):
            there = {"run": st.query_params["run"], "layer": f"{layer:.0f}", "expert": f"{expert:.0f}"}
            st.page_link("views/experts.py", label=f"Layer {layer:.0f}, expert {expert:.0f}", query_params=there)


def paths_page(source: opened.Source) -> None:
    run = opened.open_run(source)
    st.html(block(element("h1", "Paths")))
    if run.sequences.empty:
        st.info("This run holds no sequences yet.")
        return
    paths = path_tables.paths(source)
    link_label_to_set(paths)
    one, other = choose_sets(source, paths)
    layers, top = choose_layers(run)
    table = path_tables.flows(source, one, None, layers, top)
    if isinstance(table, UsageError):
        complete()
        refusal(table)
        return
    level = path_view.suggested_level(table)
    least = choose(
        "Least share of a drawn flow", "least", path_view.LEVELS, format_func="{:.2%}".format, control=st.select_slider,
        default=level, filters=True,
    )  # fmt: skip
    complete()
    heading("Which way do these tokens go through the layers?", METHOD)
    st.text(f"{len(paths.token_id):,} of the run's {paths.whole:,} tokens are read: completions, of whole problems.")
    sides = st.columns(2) if other else [st.container()]
    names = [":".join(one), ":".join(other)] if other else [":".join(one)]
    for side, name, which, against in zip(sides, names, ("one", "other"), (None, other), strict=False):
        with side:
            show_flows(path_tables.flows(source, one, against, layers, top), name, least, which=which)
    if other:
        heading("Where do the two part?", DIFFERENCE_METHOD)
        differences = path_tables.differences(source, one, other, layers, top)
        if isinstance(differences, UsageError):
            refusal(differences)
        else:
            st.text(path_view.told_differences(differences))
            drawn = charts.difference_dots(differences, one=charts.escape(told(names[0])), other=charts.escape(told(names[1])))
            figure(drawn, name="difference", question="Differences of the two sets by flow", data=differences)
    show_list(table)


paths_page(opened.source())
