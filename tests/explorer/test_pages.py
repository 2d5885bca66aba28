"""The pages in Streamlit's own test harness; `browser/` drives them in Chromium."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
from exploring import chart, choose, error, page_text, press, strip, values
from hostile import LONG, TEXTS
from synthetic import synthetic_run

from ling_probe.analysis import expert_load, label_specialisation, load_balance
from ling_probe.report import headline
from ling_probe.run import Run
from ling_probe.token_view import problem_table, sequence_choices, token_layers, token_scale, token_table


def test_overview_shows_what_the_tables_say(runs, visit):
    app, run = visit(run="planted"), Run.open(runs / "planted")
    first = headline(run, {"label_specialisation": label_specialisation(run)})
    text = page_text(app)
    assert not app.exception
    assert not app.error
    assert "Routing of synthetic on synthetic test" in text
    assert f"60 sequences · {first['tokens']:,} tokens · {first['steps']:,} steps" in text
    assert "0 of 100 differ" in text
    assert len(first["accuracy"]) == 3
    for row in first["accuracy"]:
        assert f"{row['correct']} of {row['judged']}" in text
        assert f"{row['share']:.1%}" in text
        assert f"{row['ci_low']:.1%} to {row['ci_high']:.1%}" in text
    best = first["specialised"][0]
    assert (best["layer"], best["expert"], best["label"]) == (2, 5, "add")
    assert "Layer 2, expert 5 prefers “add”" in text
    for row in first["specialised"]:
        assert f"{2 ** row['log2_ratio']:.2f}×" in text
        assert f"{2 ** row['ci_low']:.2f}× to {2 ** row['ci_high']:.2f}×" in text
        assert f"{row['q']:.3g}" in text


def test_overview_draws_balance_with_its_floor_and_the_load(runs, visit):
    app, run = visit(run="planted"), Run.open(runs / "planted")
    lines, balance = chart(app, 0), load_balance(run)
    balance = balance[balance["family"] == "all"]
    names = ("gini", "gini_floor", "max_vio", "max_vio_floor", "entropy", "entropy_floor")
    for line, name in zip(lines, names, strict=True):
        np.testing.assert_allclose(values(line["y"]), balance[name])
    load = expert_load(run)["log2_ratio"].to_numpy(np.float32)
    np.testing.assert_array_equal(values(chart(app, 1)[0]["z"]).ravel(), load)


def test_overview_leads_to_an_example_of_the_surest_effect(runs, visit):
    app, run = visit(run="planted"), Run.open(runs / "planted")
    link, *_ = app.get("page_link")
    address = {name: value for name, (value,) in parse_qs(link.proto.query_string).items()}
    assert {"run": "planted", "layer": "2", "expert": "5"}.items() <= address.items()
    shown = visit("tokens", **address)
    steps = run.steps[run.steps["label"] == "add"].groupby("sequence").size()
    assert shown.query_params["problem"] == address["problem"]
    assert problem_table(run)["sequence_id"].tolist().index(address["problem"]) == steps.idxmax()
    assert strip(shown)["marked"] == 5


def test_without_an_effect_overview_says_so(visit):
    app = visit(run="null")
    assert "No expert's preference for a step label is significant" in page_text(app)
    assert any("Look first at the tokens of a problem" in text.value for text in app.text)


def test_a_changed_or_unfinished_run_is_marked(make_run, visit):
    from ling_probe.interventions import exclude

    run = make_run(4, finish=False, interventions=[exclude(layer=2, experts=[3])])
    warnings = [warning.value for warning in visit(folder=run.folder).warning]
    assert any("not complete" in each for each in warnings)
    assert any("Routing was changed" in each for each in warnings)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_strip_holds_the_table(runs, visit, layer):
    app, run = visit("tokens", run="planted", problem="b-0007", layer=layer), Run.open(runs / "planted")
    expected, shown = token_table(run, 7, layer=layer), strip(app)
    assert [row["token"] for row in shown["tokens"]] == expected["token"].tolist()
    assert [row["experts"] for row in shown["tokens"]] == [list(each) for each in expected["experts"]]
    assert [row["expert"] for row in shown["tokens"]] == expected["expert"].tolist()
    assert [row["label"] for row in shown["tokens"]] == expected["label"].tolist()
    assert shown["tokens"][-1]["loss"] is None
    assert shown["tokens"][0]["loss"] == pytest.approx(expected["loss"][0])
    colours = {entry["expert"]: entry["colour"] for entry in shown["legend"]}
    assert len(colours) == min(8, expected["expert"].nunique())
    assert [row["colour"] for row in shown["tokens"]] == [colours.get(expert) for expert in expected["expert"]]
    assert shown["pinned"] is None


def test_tokens_are_coloured_by_what_the_address_says(runs, visit):
    app, run = visit("tokens", run="planted", problem="b-0007", layer=2, colour="loss"), Run.open(runs / "planted")
    scale, shown = token_scale(run, 7, layer=2, by="loss"), strip(app)
    assert shown["scale"] == {"name": scale.name, "low": scale.low, "high": scale.high}
    assert [row["value"] for row in shown["tokens"]][:-1] == pytest.approx(scale.values[:-1].tolist())
    assert [row["level"] for row in shown["tokens"]][:-1] == pytest.approx(scale.levels[:-1].tolist())
    assert shown["tokens"][-1]["value"] is shown["tokens"][-1]["level"] is None
    app = choose(app, "Colour", "entropy")
    assert app.query_params["colour"] == "entropy"
    assert strip(app)["scale"]["name"] == "entropy of the chosen weights, of its maximum"
    app = choose(app, "Colour", "expert")
    assert "colour" not in app.query_params
    assert strip(app)["scale"] is None


def test_agreement_is_with_a_run_of_the_folder(make_run, visit):
    run, other = make_run(6), make_run(6, seed=2)
    app = visit("tokens", folder=run.folder.parent, run=run.folder.name, problem="deduction-0001", layer=1, colour="agreement")
    assert app.query_params["against"] == other.folder.name
    expected = token_scale(run, 1, layer=1, by="agreement", against=other)
    found = [np.nan if row["value"] is None else row["value"] for row in strip(app)["tokens"]]
    np.testing.assert_array_equal(found, expected.values)
    app = visit("tokens", folder=run.folder.parent, run=run.folder.name, colour="agreement", against="../x")
    assert any("no against" in warning.value for warning in app.warning)


def test_runs_that_cannot_be_compared_are_told(visit):
    app = visit("tokens", run="planted", colour="agreement", against="hostile")
    assert not app.exception
    assert any("Not applicable" in text.value for text in app.text)
    assert strip(app)["scale"] is None


def test_a_colour_that_the_run_cannot_show_is_told(visit):
    app = visit("tokens", run="planted", colour="margin")
    assert any("no colour" in warning.value for warning in app.warning)
    assert strip(app)["scale"] is None


def test_a_pinned_token_shows_every_layer(runs, visit):
    app, run = visit("tokens", run="planted", problem="b-0007", layer=2, token=9), Run.open(runs / "planted")
    expected = token_layers(sequence_choices(run, 7), 9)
    assert strip(app)["pinned"] == 9
    heat = chart(app)[0]
    np.testing.assert_allclose(values(heat["z"]).ravel(), expected["weight"], rtol=1e-6)
    assert values(heat["text"]).ravel().tolist() == expected["expert"].tolist()
    text = page_text(app)
    assert "at position 9, through all layers" in text
    for row in expected.itertuples():
        assert f"{row.expert} ({row.weight:.3f})" in text


def test_the_address_restores_a_view(visit):
    address = {"run": "planted", "problem": "a-0004", "layer": "3", "token": "5", "expert": "2", "family": "a"}
    app = visit("tokens", **address)
    assert app.query_params == address
    assert {box.label: box.value for box in app.selectbox} == {"Run": "planted"} | {
        "Family": "a",
        "Answers": "*",
        "Colour": "expert",
        "Layer": 3,
        "Problem": "a-0004",
    }


def test_paging_follows_the_filters_and_unpins(runs, visit):
    problems = problem_table(Run.open(runs / "planted"))
    wrong = problems[(problems["family"] == "b") & (problems["correct"] == False)]["sequence_id"].tolist()  # noqa: E712
    app = visit("tokens", run="planted", problem="a-0004", token=3)
    app = choose(choose(app, "Family", "b"), "Answers", "wrong")
    assert app.query_params["problem"] == wrong[0]
    assert "token" not in app.query_params
    app = press(app, "Next")
    assert app.query_params["problem"] == wrong[1]
    assert f"2 of {len(wrong)}" in [text.value for text in app.text]
    assert press(app, "Previous").query_params["problem"] == wrong[0]


def test_a_layer_changes_the_strip_and_keeps_the_pin(runs, visit):
    app = choose(visit("tokens", run="planted", problem="a-0004", token=3), "Layer", 3)
    assert app.query_params["layer"] == "3"
    assert app.query_params["token"] == "3"
    expected = token_table(Run.open(runs / "planted"), 4, layer=3)
    assert [row["expert"] for row in strip(app)["tokens"]] == expected["expert"].tolist()


@pytest.mark.parametrize(
    ("name", "value"), [("token", "9999"), ("token", "-1"), ("token", "x"), ("layer", "0"), ("problem", "z")]
)
def test_an_address_that_names_nothing_is_said(visit, name, value):
    app = visit("tokens", run="planted", **{name: value})
    assert not app.exception
    assert any(f"no {name}" in warning.value and value.strip("-") in warning.value for warning in app.warning)
    assert strip(app)["pinned"] is None


def test_a_long_text_is_shown_in_windows(make_run, visit):
    run = make_run(1, n_steps=(3, 3), step_tokens=(900, 900), parts=1)
    app = visit("tokens", folder=run.folder, run=run.folder.name)
    assert len(strip(app)["tokens"]) == 2000
    app = choose(app, "Tokens from position", 2000)
    assert [row["position"] for row in strip(app)["tokens"]] == list(range(2000, len(token_table(run, 0, layer=1))))


def test_a_run_without_sequences_or_steps(make_run, visit):
    empty = make_run(0)
    assert "holds no sequences yet" in visit("tokens", folder=empty.folder, run=empty.folder.name).info[0].value
    app = visit(folder=empty.folder)
    assert not app.exception
    assert "Not applicable" in page_text(app)
    bare = make_run(4, n_steps=(0, 0))
    app = visit(folder=bare.folder)
    assert not app.exception
    assert "Not applicable: no step labels in this run" in page_text(app)


class Tags(HTMLParser):
    """Names of the elements in a text, and of their attributes."""

    def __init__(self, text) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}


OURS = {
    "div",
    "h1",
    "h2",
    "h3",
    "p",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "caption",
    "code",
    "i",
    "b",
    "span",
}


@pytest.mark.parametrize("page", ["overview", "tokens", "balance", "specialisation", "compare"])
def test_hostile_texts_are_shown_and_inert(visit, page):
    app = visit(page, run="hostile", token=1)
    assert not app.exception
    assert not app.markdown
    assert not app.get("iframe")
    pieces = [each.proto.body for each in app.get("html") if not each.proto.body.startswith("<style>/* Nothing")]
    assert set().union(*(Tags(piece).found for piece in pieces)) <= OURS | {"class", "scope"}
    shown = page_text(app)
    if page == "overview":
        assert "Routing of <b>$model$</b> on <img src=x onerror=alert(1)> $t$" in shown
        assert ":red[0] of <i>9</i> differ" in shown
        assert "<u>key</u>" in shown
    if page == "tokens":
        assert [row["token"] for row in strip(app)["tokens"]][: len(TEXTS)] == list(TEXTS)
        assert TEXTS[0] in shown
        assert strip(app)["tokens"][len(TEXTS)]["pieces"][-1] == [f"‹… and {len(LONG) - 200:,} more›", True]
        assert len(app.get("bidi_component")[0].proto.json) < 200_000


def test_the_component_sets_text_and_no_markup():
    apps = Path(__file__).parents[2] / "apps"
    script = (apps / "token_strip.js").read_text(encoding="utf-8")
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script)
    for page in apps.rglob("*.py"):
        assert not re.search(r"unsafe_allow|st\.markdown|st\.write\b", page.read_text(encoding="utf-8")), page


def test_damage_is_one_line_and_no_traceback(make_run, visit):
    run = make_run(4, parts=1)
    tokens = run.folder / "parts/00000/tokens.parquet"
    tokens.write_bytes(tokens.read_bytes()[:500])
    for page in ("overview", "tokens"):
        found = error(visit(page, folder=run.folder, run=run.folder.name))
        assert "tokens.parquet cannot be read" in found
        assert "\n" not in found
    (run.folder / "run.json").write_text("{", encoding="utf-8")
    assert "is not valid JSON" in error(visit(folder=run.folder))


def test_errors_are_escaped(tmp_path, visit):
    folder = tmp_path / ":red[a] $x$ [l](http:)"
    app = visit(folder=folder)
    assert str(folder) in error(app)
    assert r"\:red\[a\] \$x\$ \[l\]\(http\:\)" in app.error[0].value


def test_a_folder_without_runs_is_said(tmp_path, visit):
    assert "holds no runs" in error(visit(folder=tmp_path))


@pytest.mark.parametrize("name", ["../null", "/etc", "elsewhere"])
def test_only_runs_of_the_folder_are_opened(runs, visit, name):
    assert f"no run {name!r} in {runs}; it has hostile, null, planted" in error(visit(run=name))


def test_links_to_runs_elsewhere_are_no_runs(make_run, tmp_path, visit):
    outside, inside = make_run(3, parts=1), tmp_path / "shown"
    synthetic_run(inside / "mine", 3, parts=1)
    (inside / "link").symlink_to(outside.folder)
    assert "it has mine" in error(visit(folder=inside, run="link"))


@pytest.mark.parametrize(
    "name",
    [
        "parts",
        "parts/00000",
        "parts/00000/tokens.parquet",
        "analysis",
        "analysis/load_balance.parquet",
        "causal",
        "causal/effects.parquet",
        "experts.safetensors",
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_links_out_of_the_folder_are_refused(make_run, tmp_path, visit, name, alone):
    outside, inside = make_run(3, parts=1), tmp_path / "shown"
    synthetic_run(inside / "mine", 3, parts=1)
    for folder in (outside.folder, inside / "mine"):
        for each in ("analysis/load_balance.parquet", "causal/effects.parquet", "experts.safetensors"):
            (folder / each).parent.mkdir(exist_ok=True)
            (folder / each).touch()
    link = inside / "mine" / name
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(outside.folder / name)
    found = error(visit(folder=inside / "mine" if alone else inside, run="mine"))
    assert "leads out of" in found
    assert name in found


def test_a_run_whose_manifest_lies_elsewhere_is_refused(make_run, tmp_path, visit):
    outside = make_run(3, parts=1)
    mine = synthetic_run(tmp_path / "mine", 3, parts=1).folder
    (mine / "run.json").unlink()
    (mine / "run.json").symlink_to(outside.folder / "run.json")
    assert "leads out of" in error(visit(folder=mine, run="mine"))
