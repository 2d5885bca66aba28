"""How much a report tells, of which experts, as which files; report.json against its schema."""

import base64
import doctest
import importlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hostile import hostile_run
from synthetic import Effects, Planted, synthetic_run

from ling_probe.analysis import (
    ANALYSES,
    SINGLE,
    Finding,
    Verdict,
    coactivation,
    expert_load,
    family_specialisation,
    label_specialisation,
)
from ling_probe.errors import UsageError
from ling_probe.report import REPORT_SCHEMA, Depth, TableKind, write_report
from ling_probe.report.experts import MOST, chosen_experts, named_experts
from ling_probe.report.figures import drawn
from ling_probe.report.sections import Section
from ling_probe.report.strongest import strongest_tokens, written_tokens
from ling_probe.report.tables import write_table
from ling_probe.run import Run
from ling_probe.spec import ModelSpec

PLANTS = (Planted(2, 5, "multiply"), Planted(3, 9, "premise"), Planted(1, 2, "add"))
FEW = ("label_specialisation", "family_specialisation", "expert_load", "coactivation")
KEPT = ("contribution", "lens")


def told(folder) -> dict:
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(written, REPORT_SCHEMA, cls=jsonschema.Draft202012Validator)
    return written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depths") / "run"
    return synthetic_run(folder, 60, planted=PLANTS, effects=Effects(token=0.5), keep=KEPT, parts=3)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("depths") / "report"
    write_report(run, folder, analyses=FEW, depth=Depth.expert, experts=["2.5", "1.15"], kinds=[TableKind.parquet])
    return folder


def test_the_schema_is_one_and_is_published():
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)
    published = Path(__file__).parents[1] / "docs" / "report.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == REPORT_SCHEMA


def test_a_report_that_lacks_something_is_told_by_the_schema(folder):
    written = told(folder)
    for change in ({"schema": 2}, {"headline": None}, {"depth": "deep"}, {"index": [{}]}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(written | change, REPORT_SCHEMA)


def test_a_summary_shows_the_figures_that_matter_and_claims_first(make_run, tmp_path):
    write_report(make_run(24, keep=("lens",)), tmp_path, depth=Depth.summary)
    written, page = told(tmp_path), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written["claims"]
    assert (written["example"], written["experts"]) == (None, [])
    assert 4 <= page.count('class="plot"') <= 6
    assert len(written["index"]) < len(SINGLE)
    assert f"{len(SINGLE) - len(written['index'])} more questions can be asked" in page
    assert {path.stem for path in (tmp_path / "tables").iterdir()} <= {row["analysis"] for row in written["index"]}


def test_tables_as_parquet_are_the_analyses(run, folder):
    assert {path.name for path in (folder / "tables").iterdir()} == {f"{name}.parquet" for name in FEW}
    table = pd.read_parquet(folder / "tables" / "label_specialisation.parquet")
    pd.testing.assert_frame_equal(table, label_specialisation(run), check_dtype=False)
    assert 'href="tables/expert_load.parquet"' in (folder / "report.html").read_text(encoding="utf-8")


def test_files_of_an_earlier_report_go(run, folder, tmp_path):
    write_report(run, tmp_path, analyses=["expert_load", "coactivation"])
    (tmp_path / "report.pdf").write_bytes(b"old")
    write_report(run, tmp_path, analyses=["expert_load"], kinds=[TableKind.csv])
    assert {path.name for path in tmp_path.rglob("*.*")} == {"report.html", "report.md", "report.json", "expert_load.csv"}


def test_experts_are_those_named_and_the_most_specialised_of_each_layer(folder):
    experts = [(one["layer"], one["expert"]) for one in told(folder)["experts"]]
    assert experts == sorted(experts)
    assert {(2, 5), (3, 9), (1, 2), (1, 15)} <= set(experts)
    assert [sum(layer == each for layer, _ in experts) for each in (1, 2, 3)] == [4, 3, 3]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f'id="expert-{layer}-{expert}"' in page for layer, expert in experts)


def test_an_expert_is_told_by_the_tables(run, folder):
    one = next(one for one in told(folder)["experts"] if (one["layer"], one["expert"]) == (2, 5))
    load = expert_load(run).query("layer == 2 and expert == 5").iloc[0]
    assert one["load"]["ci_low"] == pytest.approx(load["ci_low"])
    best, table = one["labels"][0], label_specialisation(run)
    row = table.query(f"layer == 2 and expert == 5 and label == '{best['name']}'").iloc[0]
    assert best["name"] == "multiply"
    assert [best[name] for name in ("log2_ratio", "ci_low", "q")] == pytest.approx(row[["log2_ratio", "ci_low", "q"]].tolist())
    families = family_specialisation(run).query("layer == 2 and expert == 5").set_index("family")["log2_ratio"]
    assert {each["name"]: each["log2_ratio"] for each in one["families"]} == pytest.approx(families.to_dict(), nan_ok=True)
    pairs = coactivation(run).query("layer == 2 and (expert == 5 or other == 5)").nlargest(1, "ci_low").iloc[0]
    assert {one["neighbours"][0]["other"], 5} == {pairs["expert"], pairs["other"]}
    assert one["neighbours"][0]["lift"] == pytest.approx(pairs["lift"])


def plain_tokens(run, layer, expert):
    """(strength, sequence, position, token, next token, lens) of every choice of an expert, the slow way."""
    row = run.spec.row(layer)
    for batch in run.batches(columns=["contribution", "lens", "token"]):
        words = batch.extra["token"]
        for token in range(len(batch.sequence)):
            last = token + 1 == len(batch.sequence) or batch.sequence[token + 1] != batch.sequence[token]
            for slot in np.flatnonzero(batch.expert_ids[token, row] == expert):
                strength, lens = (float(batch.extra[name][token, row, slot]) for name in ("contribution", "lens"))
                yield (
                    strength,
                    batch.sequence[token],
                    batch.position[token],
                    words[token],
                    None if last else words[token + 1],
                    lens,
                )


def test_strongest_tokens_are_those_of_a_plain_search(run):
    found = strongest_tokens(run, [(2, 5), (3, 0)], n=40)
    for (layer, expert), rows in found.items():
        best = {}
        for strength, sequence, position, word, *_ in plain_tokens(run, layer, expert):
            best[sequence] = max(best.get(sequence, (0.0,)), (strength, -position, word))
        expected = sorted(best.items(), key=lambda each: (-each[1][0], each[0]))[:40]
        assert [row["strength"] for row in rows] == pytest.approx([value[0] for _, value in expected])
        assert [row["token"] for row in rows] == [value[2] for _, value in expected]
        texts = run.sequences.set_index("sequence_id")
        for row in rows:
            whole = texts.loc[row["sequence_id"], "prompt"] + texts.loc[row["sequence_id"], "completion"]
            assert row["before"] + row["token"] + row["after"] in f"{whole} w0"
            assert row["measure"] == "contribution"


def test_written_tokens_are_means_of_what_was_added(run, make_run):
    (found,) = written_tokens(run, [(2, 5)], n=100).values()
    added: dict = {}
    for *_, word, lens in plain_tokens(run, 2, 5):
        if word is not None:
            added.setdefault(word, []).append(lens)
    means = sorted((np.mean(values), word) for word, values in added.items() if len(values) >= 10)
    assert [row["mean"] for row in found["promoted"]] == pytest.approx([mean for mean, _ in means[::-1]])
    assert [row["token"] for row in found["promoted"]] == [word for _, word in means[::-1]]
    assert found["demoted"] == []
    assert written_tokens(make_run(), [(2, 5)], n=3) == {}


def test_experts_stay_few_whatever_the_model():
    spec = ModelSpec(
        name="large", n_layers=81, routed_layers=tuple(range(1, 81)), n_experts=256, top_k=8, n_groups=8, topk_groups=4,
        scale=2.5, n_shared=1, d_model=8, vocab_size=64,
    )  # fmt: skip
    load = pd.DataFrame({"layer": np.repeat(spec.routed_layers, 2), "expert": [0, 7] * 80, "log2_ratio": [0.1, -2.0] * 80})
    found = chosen_experts(spec, {"expert_load": load}, [(80, 3)])
    assert len(found) == MOST
    assert (80, 3) in found
    assert found[0] == (1, 7)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["5"], 'no expert "5"; write layer and expert with a dot between, such as 1.0'),
        (["2.x"], 'no expert "2.x"'),
        (["2.16"], "no expert 16 in layer 2; synthetic has 16 a layer, counted from 0"),
        (["0.1"], "layer 0"),
        (["1.1"] * 61, "61 experts named; a report tells of 60 at most"),
    ],
)
def test_experts_that_are_not_there(run, names, message):
    with pytest.raises(UsageError, match=message):
        named_experts(names, run.spec)


def test_experts_need_their_depth(run, tmp_path):
    with pytest.raises(UsageError, match="told of in a report of depth expert, and this one is of depth full"):
        write_report(run, tmp_path / "report", experts=["1.1"])


def test_the_example_is_the_problem_with_most_steps_of_the_surest_experts_kind(run, folder):
    written = told(folder)
    example, label = written["example"], written["headline"]["specialised"][0]["label"]
    counts = run.steps[run.steps["label"] == label].groupby("sequence").size()
    chosen = run.sequences["sequence_id"].tolist().index(example["sequence_id"])
    assert counts[chosen] == counts.max()
    assert example["chosen_for"] == label
    assert [step["step"] for step in example["steps"]] == list(range(example["n_steps"]))
    assert {row["layer"] for row in example["attribution"]} == {1, 2, 3}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(step["text"] in page for step in example["steps"])


def test_what_a_run_cannot_tell_is_said(make_run, tmp_path):
    plain = make_run(labels={"text": ("other",)}, n_steps=(0, 0))
    write_report(plain, tmp_path, analyses=["label_specialisation", "expert_load"], depth=Depth.expert)
    written = told(tmp_path)
    assert written["example"]["note"] == "Not applicable: no step labels in this run."
    assert len(written["experts"]) == 9
    assert all(one["labels"] == [] and one["tokens"][0]["measure"] == "weight" for one in written["experts"])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    run = hostile_run(folder / "run")
    write_report(run, folder / "report", analyses=FEW, depth=Depth.expert)
    return folder / "report"


def test_no_text_of_a_figure_ends_its_script_or_is_endless():
    figure = go.Figure(go.Bar(x=["</script><script>", "x" * 10**6], y=np.array([1.0, 2.0])), layout={"title": "<!--"})
    section = Section(
        analysis=ANALYSES["expert_load"], finding=Finding(sentence="", verdict=Verdict.SUPPORTED), figures=(figure,)
    )
    (one,) = drawn(section)
    assert "<" not in one["data"]
    assert len(one["data"]) < 10_000
    values = json.loads(one["data"])["data"][0]
    assert values["x"][0] == "</script><script>"
    assert np.frombuffer(base64.b64decode(values["y"]["bdata"]), values["y"]["dtype"]).tolist() == [1, 2]
    assert one["title"] == "<!--"


def test_tokens_keep_their_line_ends_apart_from_spaces(tmp_path):
    table = pd.DataFrame({"name": [" ", "\n", "\t", "\x1b[2J", "=1+1", None], "count": range(6)})
    write_table(tmp_path, "enrichment", table, [TableKind.csv, TableKind.parquet])
    names = pd.read_parquet(tmp_path / "enrichment.parquet")["name"].tolist()
    assert names[:5] == [" ", "⏎", "⇥", "‹1B›[2J", "=1+1"]
    assert pd.isna(names[5])
    assert "\x1b" not in (tmp_path / "enrichment.csv").read_text(encoding="utf-8")


def test_hostile_texts_stay_text(hostile):
    told(hostile)
    page, words = ((hostile / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    own = page.split("<body>")[1]
    assert own.count("<script>") == 1
    assert "<script>document.title" not in own
    assert "<img" not in own + words
    assert "<script>" not in words
    for text in (page, words, (hostile / "report.json").read_text(encoding="utf-8")):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert "‹202E›abc‹2066›" in text


def test_endless_texts_do_not_make_a_page_large(tmp_path):
    run = hostile_run(tmp_path / "run", 12, more=("long" * 250_000,))
    assert isinstance(run, Run)
    write_report(run, tmp_path / "report", analyses=FEW, depth=Depth.expert)
    told(tmp_path / "report")
    assert (tmp_path / "report" / "report.html").stat().st_size < 3_000_000
    assert all(path.stat().st_size < 1_000_000 for path in (tmp_path / "report" / "tables").iterdir())
    assert "(1,000,000 letters)" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["shown", "report.figures", "analysis.accuracy"])
def test_doctests_hold(name):
    found = doctest.testmod(importlib.import_module(f"ling_probe.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
