"""Change routing live: one prompt, with the model as it is and under a change. The only page that loads a model, when asked."""

import sys
from typing import Any

import opened
import streamlit as st
from address import choose, chosen, complete, put
from exhibit import figure, heading
from page_html import block, element, facts, markdown, table

from ling_probe import charts
from ling_probe.errors import LingProbeError
from ling_probe.interventions import Intervention
from ling_probe.run import Run
from ling_probe.shipping import shipped_models

# Comments, for Streamlit would print a string that stands alone.
Asked = tuple[str, str, tuple[Intervention, ...], int]  # model, prompt, changes, tokens
MOST_TOKENS = 256
MOST_LETTERS = 8000
SECONDS = 120.0
KINDS = {
    "exclude": "exclude: cannot be chosen, the next best steps in",
    "silence": "silence: stays chosen and adds nothing",
    "force": "force: always chosen",
    "bias": "bias: raise the choice score",
}


def models(run: Run) -> list[str]:
    # Shipped ones, and those the explorer was started with; never one that a visitor names. The run's own comes first.
    named = [*dict.fromkeys([*sys.argv[2:], *shipped_models()])]
    return sorted(named, key=lambda name: name != run.spec.name)


@st.cache_resource(max_entries=1, show_spinner="Loading the model and verifying its routing")
def loaded(name: str) -> Any:
    from ling_probe.model.load import load_native

    return load_native(name)


def choose_problem(source: opened.Source) -> str:
    # The prompt of the problem in the address, or of the first.
    problems = opened.problems(source)
    if problems.empty:
        return ""
    ids = problems["sequence_id"]
    asked = chosen("problem")
    if asked is not None and not ids.eq(asked).any():
        st.warning(markdown(f"no problem {asked!r} here; showing {ids.iloc[0]}"))
        asked = None
    name = asked or str(ids.iloc[0])
    st.session_state["shown"]["problem"] = name
    return str(opened.facts(source, int(problems.index[ids == name][0]))["prompt"])


def choose_experts(run: Run) -> list[int]:
    # Several, in the address as "3,5"; a link from another page names one as "expert".
    known = set(map(str, range(run.spec.n_experts)))
    text = chosen("experts") or chosen("expert") or "0"
    words = [word for word in text.split(",") if word]
    if wrong := [word for word in words if word not in known]:
        st.warning(markdown(f"no expert {wrong[0]!r} here; there are 0 to {run.spec.n_experts - 1}"))
    found = sorted({int(word) for word in words if word in known})
    st.session_state["choose-experts"] = found
    st.session_state["shown"]["experts"] = ",".join(map(str, found)) or None
    used = lambda: put({"experts": ",".join(map(str, sorted(st.session_state["choose-experts"]))) or "0"})  # noqa: E731
    st.multiselect("Experts", range(run.spec.n_experts), key="choose-experts", on_change=used)
    return found


def choose_value(kind: str) -> float:
    # What bias adds to the choice score, from -1 to 1: scores lie between 0 and 1.
    if kind != "bias":
        st.session_state["shown"]["value"] = None
        return 0.0
    text = chosen("value")
    try:
        value = float(text or "0.1")
        if not (-1 <= value <= 1 and value):
            raise ValueError
    except ValueError:
        st.warning(markdown(f"no value {text!r} here; it is a number from -1 to 1 other than 0"))
        value = 0.1
    st.session_state["choose-value"] = value
    st.session_state["shown"]["value"] = f"{value:g}"
    used = lambda: put({"value": f"{st.session_state['choose-value']:g}"})  # noqa: E731
    st.number_input("Added to the choice score", -1.0, 1.0, step=0.05, key="choose-value", on_change=used)
    return value


def try_it(asked: Asked, run: Run) -> None:
    # Run when the button is pressed; nothing of the model's libraries is imported before.
    from ling_probe.laboratory import try_change

    name, prompt, changes, tokens = asked
    try:
        model = loaded(name)
        with st.spinner("Writing twice"):
            outcome = try_change(model, prompt, changes, max_new_tokens=tokens, seconds=SECONDS)
    except LingProbeError as error:
        st.session_state.pop("lab", None)
        st.error(markdown(str(error)))
        return
    same = model.digest == run.manifest.model.get("digest")
    st.session_state["lab"] = {"asked": asked, "run": run.folder, "outcome": outcome, "own": same}


def show(outcome: Any, own: bool) -> None:
    if not own:
        st.info("This model's weights are not those that the run was made with.")
    verdict = "The text stays the same." if outcome.before == outcome.after else "The text becomes another."
    values = {
        "loss on the old text": f"{outcome.loss_before:.3g} nats a token",
        "the same under the change": f"{outcome.loss_after:.3g} nats a token",
    }
    st.html(block(element("h2", verdict), facts(values)))
    left, right = st.columns(2)
    with left:
        st.html(block(element("h3", "As it is"), text(outcome.before, outcome.shared)))
    with right:
        st.html(block(element("h3", "Under the change"), text(outcome.after, outcome.shared)))
    heading(
        "Which choices does the change move?",
        "Prompt and old text, read again under the change: of each token's experts in a layer, the share that are others.",
    )
    figure(charts.moved_heatmap(outcome.choices), name="moved", question="Share of choices moved, by layer and token")
    rows = [(row.layer, f"{row.moved:.1%}", f"{row.touched:.1%}") for row in outcome.layers.itertuples()]
    st.html(block(table(["layer", "choices moved", "tokens with any moved"], rows)))


def text(written: str, shared: int) -> str:
    # What both begin with is soft, what is new stands out.
    if not written:
        return element("p", "nothing", class_="soft")
    parts = (element("span", written[:shared], class_="soft"), element("b", written[shared:]))
    return f'<div class="written">{"".join(parts)}</div>'


def lab(source: opened.Source) -> None:
    run = opened.open_run(source)
    st.html(
        block(
            element("h1", "Lab"),
            element(
                "p",
                "Change routing and see what the model makes of one prompt. The model is loaded when you press the button.",
                class_="soft",
            ),
        )
    )
    given = choose_problem(source)
    first, second, third, fourth = st.columns([2, 3, 1, 3])
    with first:
        name = choose("Model", "model", models(run))
    with second:
        kind = choose("Change", "change", list(KINDS), format_func=KINDS.__getitem__)
    with third:
        layer = choose("Layer", "layer", run.spec.routed_layers)
    with fourth:
        experts = choose_experts(run)
    value = choose_value(kind)
    complete()
    prompt = st.text_area("Prompt", given[:MOST_LETTERS], key=f"prompt-{chosen('problem')}", max_chars=MOST_LETTERS)
    tokens = st.slider("New tokens, at most", 16, MOST_TOKENS, 128, step=16)
    if not experts:
        st.info("Choose an expert to change.")
        return
    asked = name, prompt, (Intervention(kind=kind, layer=layer, experts=tuple(experts), value=value),), tokens
    if st.button("Write with and without the change", type="primary"):
        try_it(asked, run)
    if (found := st.session_state.get("lab")) and found["run"] == run.folder:
        if found["asked"] != asked:
            st.warning("The settings have changed since; this is what those before did. Press the button to try these.")
        show(found["outcome"], found["own"])


lab(opened.source())
