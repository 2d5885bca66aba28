import base64
import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_spec, synthetic_traces

from ling_probe.analysis import ANALYSES, SINGLE, Verdict, label_specialisation, surest_picked
from ling_probe.errors import UsageError
from ling_probe.interventions import exclude
from ling_probe.report import Depth, headline, tables, write_report
from ling_probe.report.figures import script_digest
from ling_probe.run import Run

NASTY = "</script><script>alert(1)</script>|&"
PLANTS = (Planted(2, 5, "multiply"), Planted(3, 9, "premise"), Planted(1, 2, "add"), Planted(1, 7, "add"))


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    effects = Effects(token=0.5, step=0.2, sequence=0.2)
    traces = synthetic_traces(synthetic_spec(), 60, rng=np.random.default_rng(1), planted=PLANTS, effects=effects)
    run = Run.create(
        folder,
        spec=traces[0].spec,
        model={"name": "ling-test", "verification": {"choices": 1234, "differ": 0, "near_ties": 2}},
        benchmark={"name": "stepbench", "split": "test"},
        options={},
    )
    run.append(traces)
    run.finish()
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "report"
    assert write_report(run, folder, depth=Depth.expert, experts=["2.0"]) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def answered(folder) -> set[str]:
    """Analyses that this run could answer; the rest say why not."""
    index = json.loads((folder / "report.json").read_text(encoding="utf-8"))["index"]
    assert [row["analysis"] for row in index] == list(SINGLE)
    return {row["analysis"] for row in index if row["verdict"] != Verdict.NOT_APPLICABLE}


def test_everything_is_there(folder):
    assert answered(folder) >= {"label_specialisation", "expert_load", "coactivation", "expert_clusters"}
    tables = {f"tables/{name}.{kind}" for name in answered(folder) for kind in ("csv", "json")}
    assert set(files(folder)) == {"report.html", "report.md", "report.json", *tables}


def test_same_run_same_bytes_whatever_the_order_of_sets(run, folder, tmp_path):
    program = [sys.executable, "-c", "from ling_probe.cli import main; main()"]
    options = ["report", run.folder, "--out", tmp_path, "--depth", "expert", "--experts", "2.0"]
    environment = os.environ | {"PYTHONHASHSEED": "4321"}
    done = subprocess.run([*program, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(folder)


def test_the_page_needs_no_network_and_can_be_mailed(folder, page):
    own = re.sub(r'<script type="text/plain" id="library">.*?</script>', "", page, count=1, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!tables/|#)""", own)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', own)[1]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+' 'sha256-[\w+/=]+';", policy)
    assert own.count('class="plot"') >= len(answered(folder))
    assert len(page.encode()) < 3_000_000
    assert '"showSendToCloud": false' in own


def test_only_the_two_scripts_that_the_policy_names_are_there(page):
    policy = re.search(r"script-src '(.*?)' '(.*?)';", page)
    inline = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    packed = re.search(r'id="library">(.*?)</script>', page)[1]
    library = gzip.decompress(base64.b64decode(packed)).decode()
    assert [script_digest(text) for text in (*inline, library)] == list(policy.groups())


def test_the_page_says_who_ran_what_and_how_well(folder, page):
    text = page.split("</head>")[1]
    assert text.index('id="claims"') < text.index("The most specialised experts") < text.index('id="index"')
    for expected in ("ling-test", "stepbench test", "60 sequences", "1234"):
        assert expected in text
    for name in SINGLE:
        assert ANALYSES[name].question in text
        assert (f'href="tables/{name}.csv"' in text) == (name in answered(folder))
    assert "What this cannot tell you" in text
    assert "prefers-color-scheme: dark" in page


def test_headline_names_three_distinct_experts_surest_first(run):
    table = label_specialisation(run)
    found = headline(run, {"label_specialisation": table})["specialised"]
    assert len(found) == 3
    experts = [(each["layer"], each["expert"]) for each in found]
    assert len(set(experts)) == 3
    assert set(experts) <= {(plant.layer, plant.expert) for plant in PLANTS}
    order = [(row.layer, row.expert) for row in surest_picked(table).itertuples() if row.picked_low > 0]
    assert experts == list(dict.fromkeys(order))[:3]
    for each in found:
        row = table[(table[["layer", "expert", "label"]] == [each["layer"], each["expert"], each["label"]]).all(axis=1)].iloc[0]
        assert (each["log2_ratio"], each["ci_low"], each["q"]) == (
            pytest.approx(row["held_out_log2_ratio"]),
            pytest.approx(row["held_out_low"]),
            pytest.approx(row["held_out_q"]),
        )


def test_an_expert_is_named_once_and_only_what_is_sure_counts(run):
    table = pd.DataFrame(
        {
            "layer": [1, 1, 1, 2, 3],
            "expert": [4, 4, 5, 4, 9],
            "label": ["add", "divide", "add", "add", "add"],
            "raw_log2_ratio": 1.0,
            "log2_ratio": [3.0, -2.0, 1.0, 2.5, 5.0],
            "ci_low": [2.0, -3.0, 0.5, 0.1, -1.0],
            "ci_high": [4.0, -1.5, 1.5, 4.0, 9.0],
            "p": 0.001,
            "q": [0.01, 0.01, 0.01, 0.01, 0.01],
        }
    )
    names = [f"{half}_{name}" for half in ("picked", "held_out") for name in ("log2_ratio", "low", "high", "q")]
    table = table.assign(**dict.fromkeys(names, np.nan), replicated=False)
    found = headline(run, {"label_specialisation": table})["specialised"]
    assert [(each["layer"], each["expert"], each["label"]) for each in found] == [(1, 4, "add"), (1, 5, "add"), (2, 4, "add")]
    nothing = headline(run, {"label_specialisation": table.assign(q=0.2)})
    assert nothing["specialised"] == []
    assert "No expert's preference" in nothing["specialised_note"]


def test_what_half_of_the_problems_is_too_few_to_pick_by_is_said_to_shrink(run):
    table = label_specialisation(run).assign(picked_q=np.nan)
    first = headline(run, {"label_specialisation": table})
    assert "picked and measured on the same" in first["specialised_note"]
    whole = table[(table["q"] < 0.05) & (table["ci_low"] > 0)]
    assert first["specialised"][0]["ci_low"] == pytest.approx(whole["ci_low"].max())


def test_headline_counts_and_judges(run):
    first = headline(run, {})
    assert (first["sequences"], first["tokens"], first["steps"]) == (60, run.manifest.parts[0].tokens, len(run.steps))
    assert first["verification"] == {"choices": 1234, "differ": 0, "near_ties": 2}
    assert [row["family"] for row in first["accuracy"]] == ["arithmetic", "causal", "deduction", "all"]
    whole = first["accuracy"][-1]
    assert whole["correct"] == run.sequences["correct"].sum()
    assert whole["ci_low"] < whole["share"] < whole["ci_high"]
    assert first["specialised"] == []
    assert "was not asked for" in first["specialised_note"]


def test_without_an_effect_the_report_says_so(make_run, tmp_path):
    write_report(make_run(30, seed=1), tmp_path / "report", analyses=["label_specialisation"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "No expert's preference for a step label is significant" in text
    assert "this run shows no preference for a label beyond its tokens that survives the correction" in text


def test_tables_are_the_analyses(run, folder):
    table = label_specialisation(run)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "tables" / "label_specialisation.csv"), table, check_dtype=False)
    rows = json.loads((folder / "tables" / "label_specialisation.json").read_text())
    assert len(rows) == len(table)
    assert rows[7]["log2_ratio"] == pytest.approx(table["log2_ratio"][7], abs=1e-12)


def test_long_tables_keep_the_rows_to_read_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLE_ROWS", 10)
    write_report(run, tmp_path / "report", analyses=["label_specialisation"])
    kept = pd.read_csv(tmp_path / "report" / "tables" / "label_specialisation.csv")
    assert len(kept) == 10
    assert (kept["q"].iloc[:4] < 0.05).all()
    assert "(the first 10 of 432 rows)" in (tmp_path / "report" / "report.html").read_text()


def test_json_says_what_the_page_says(run, folder):
    written = json.loads((folder / "report.json").read_text())
    assert written["headline"]["model"] == "ling-test"
    assert [section["name"] for section in written["sections"]] == list(SINGLE)
    findings = (folder / "report.md").read_text()
    assert "layer 2, expert 5" in findings or "layer 3, expert 9" in findings or "layer 1, expert" in findings


def test_a_run_without_steps_answers_what_it_can(make_run, tmp_path):
    plain = make_run(labels={"text": ("other",)}, n_steps=(0, 0))
    write_report(plain, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("Not applicable: no step labels in this run.") >= 4
    assert "Not applicable: one family only in this run" in text
    assert not (tmp_path / "report" / "tables" / "label_specialisation.csv").exists()
    assert (tmp_path / "report" / "tables" / "expert_load.csv").exists()
    sections = json.loads((tmp_path / "report" / "report.json").read_text())["sections"]
    answered = {each["name"]: each["total_rows"] > 0 for each in sections}
    assert answered["load_balance"]
    assert not answered["label_specialisation"]


def test_text_from_outside_is_shown_not_obeyed(tmp_path):
    spec = synthetic_spec(name=NASTY)
    labels = {NASTY: (NASTY, "add"), "other": ("add", "multiply")}
    traces = synthetic_traces(spec, 20, rng=np.random.default_rng(0), labels=labels)
    traces = [replace(trace, sequence_id=str(number), tokens=(NASTY,) * trace.n_tokens) for number, trace in enumerate(traces)]
    run = Run.create(
        tmp_path / "run",
        spec=spec,
        model={"name": NASTY, "verification": {NASTY: NASTY}},
        benchmark={"name": NASTY},
        options={"note": NASTY},
    )
    run.append(traces)
    write_report(run, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "<script>" not in markdown
    assert "\\|" in markdown


def test_changed_routing_and_open_runs_are_marked(make_run, tmp_path):
    run = make_run(interventions=(exclude(2, [5]),), finish=False)
    write_report(run, tmp_path / "report", analyses=["load_balance"])
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "This run is not complete" in text
        assert "it does not describe the model as released" in text


def test_what_cannot_be_reported_is_refused_before_anything_is_written(run, make_run, tmp_path):
    with pytest.raises(UsageError, match='no analysis "astrology"; these there are: routing_information, '):
        write_report(run, tmp_path / "report", analyses=["astrology"])
    with pytest.raises(UsageError, match="holds no sequences yet"):
        write_report(make_run(0), tmp_path / "report")
    assert not (tmp_path / "report").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        write_report(run, tmp_path / "file")
