"""Runs against each other: answers to the same problems, and the comparison that is written."""

import json
import subprocess
import sys
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hostile import hostile_run
from pairs import plain_traces, rerouted, write_run
from scipy import stats as distributions
from synthetic import synthetic_spec

from ling_probe import charts
from ling_probe.analysis import ANALYSES, Verdict, accuracy_difference, route_agreement
from ling_probe.analysis.accuracy import paired_difference
from ling_probe.errors import UsageError
from ling_probe.report import REPORT_SCHEMA, write_comparison


def judged(traces, rng, *, share):
    return [replace(trace, correct=bool(rng.random() < share)) for trace in traces]


def pair(folder, share, other, *, n=60, seed=0):
    rng, traces = np.random.default_rng(seed), plain_traces(n, n_steps=(1, 2), step_tokens=(2, 3))
    return [write_run(folder / f"{place}", judged(traces, rng, share=each)) for place, each in enumerate((share, other))]


def test_differences_are_those_of_counting(tmp_path):
    one, other = pair(tmp_path, 0.9, 0.6)
    table = accuracy_difference([one, other]).set_index("family")
    assert list(table.index) == ["arithmetic", "causal", "deduction", "all"]
    here, there = (run.sequences["correct"].to_numpy(dtype=bool) for run in (one, other))
    whole = table.loc["all"]
    assert (whole["only_first"], whole["only_other"]) == ((here & ~there).sum(), (there & ~here).sum())
    assert whole["difference"] == pytest.approx(here.mean() - there.mean())
    chances = distributions.binom(whole["only_first"] + whole["only_other"], 0.5)
    assert whole["p"] == pytest.approx(2 * chances.cdf(min(whole["only_first"], whole["only_other"])))
    assert table["problems"].tolist() == [20, 20, 20, 60]
    found = ANALYSES["accuracy_difference"].finding(table.reset_index())
    assert found.verdict is Verdict.SUPPORTED
    assert found.ci_low > 0


def test_only_problems_that_both_answered_count(tmp_path):
    traces = plain_traces(12)
    some = [replace(trace, correct=None) if number < 4 else trace for number, trace in enumerate(traces)]
    runs = [write_run(tmp_path / "one", traces), write_run(tmp_path / "other", some[2:][::-1])]
    assert accuracy_difference(runs).set_index("family").loc["all", "problems"] == 8
    with pytest.raises(UsageError, match="no problem was judged in two of these runs"):
        accuracy_difference([runs[0], write_run(tmp_path / "none", [replace(trace, correct=None) for trace in traces])])


def test_runs_that_answer_alike_are_seldom_told_apart_and_the_interval_holds(tmp_path):
    rng, n = np.random.default_rng(0), 40
    one, other = rng.random((2, 2000, n)) < 0.8
    first, second = (one & ~other).sum(axis=1), (other & ~one).sum(axis=1)
    bounds = np.array([paired_difference(*counts, n) for counts in zip(first.tolist(), second.tolist(), strict=True)])
    assert ((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)).mean() > 0.93
    p = [distributions.binomtest(a, a + b).pvalue if a + b else 1.0 for a, b in zip(first, second, strict=True)]
    assert np.mean(np.array(p) < 0.05) < 0.05
    runs = pair(tmp_path, 0.8, 0.8)
    assert ANALYSES["accuracy_difference"].finding(accuracy_difference(runs)).verdict is not Verdict.SUPPORTED


def test_the_chart_shows_the_table(tmp_path):
    table = accuracy_difference(pair(tmp_path, 0.9, 0.6)).assign(against="<b>x</b>")
    figure = charts.accuracy_bars(table)
    assert figure.data[1].x.tolist() == table["difference"].tolist()
    assert figure.data[1].y[0] == "arithmetic · &lt;b>x&lt;/b>"
    assert figure.layout.shapes[0].x0 == 0


def told(folder):
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(written, REPORT_SCHEMA)
    return written


def test_a_comparison_tells_what_the_analyses_found(tmp_path):
    traces = plain_traces(24)
    rng = np.random.default_rng(0)
    runs = [write_run(tmp_path / "a", judged(traces, rng, share=0.9)), write_run(tmp_path / "b", rerouted(traces, share=0.3))]
    page = write_comparison(runs, tmp_path / "out")
    written = told(tmp_path / "out")
    assert (written["kind"], written["headline"]) == ("comparison", None)
    assert [run["name"] for run in written["comparison"]["runs"]] == ["a", "b"]
    table = route_agreement(runs).query("margin == 'all'")
    agreement = written["comparison"]["agreement"]
    assert [row["agreement"] for row in agreement] == pytest.approx(table["agreement"].tolist())
    assert [row["token_agreement"] for row in agreement] == pytest.approx(table["token_agreement"].tolist())
    assert len(written["comparison"]["answers"]) == 4
    text = page.read_text(encoding="utf-8")
    assert "<title>Routing of a against b</title>" in text
    assert f"{100 * table['agreement'].iloc[0]:.1f} %" in text
    assert (tmp_path / "out" / "tables" / "accuracy_difference.csv").exists()


def test_incomparable_runs_are_refused_before_anything_is_written(tmp_path, make_run):
    one = write_run(tmp_path / "one", plain_traces(6))
    other = write_run(tmp_path / "other", plain_traces(6, spec=synthetic_spec(n_experts=32)))
    with pytest.raises(UsageError, match=r"has experts 16 and .*other 32; only runs of one geometry compare"):
        write_comparison([one, other], tmp_path / "out")
    with pytest.raises(UsageError, match="is compared with itself"):
        write_comparison([one, one], tmp_path / "out")
    with pytest.raises(UsageError, match="holds no sequences yet"):
        write_comparison([one, make_run(0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_names_stay_text(tmp_path):
    runs = [hostile_run(tmp_path / f"<b>{name}") for name in ("one", "other\u202e")]
    page = write_comparison(runs, tmp_path / "out").read_text(encoding="utf-8")
    told(tmp_path / "out")
    own = page.split("<body>")[1]
    assert "<b>" not in own
    assert "<img" not in own
    assert "&lt;b&gt;other‹202E›" in own


def ling(*words):
    program = [sys.executable, "-c", "from ling_probe.cli import main; main()"]
    return subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=False)


def test_the_command_line_compares_refuses_and_prints_the_schema(tmp_path):
    traces = plain_traces(12)
    runs = [write_run(tmp_path / name, traced).folder for name, traced in (("a", traces), ("b", rerouted(traces)))]
    done = ling("compare", *runs, "--out", tmp_path / "out", "--json", "--tables", "parquet", "--workers", 1)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["table"] for row in rows} == {"index", "runs", "answers", "agreement"}
    assert {path.suffix for path in (tmp_path / "out" / "tables").iterdir()} == {".parquet"}
    done = ling("compare", runs[0], "--out", tmp_path / "none")
    assert (done.returncode, done.stderr) == (
        2,
        "ling-probe: name two runs or more: ling-probe compare RUN OTHER --out FOLDER\n",
    )
    assert json.loads(ling("report", "--schema").stdout) == REPORT_SCHEMA
    done = ling("report", runs[0], "--experts", "1.1", "--out", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()
