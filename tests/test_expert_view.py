"""The list of experts and the facts of one against the tables and the run they are picked from."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, synthetic_run, synthetic_spec, synthetic_traces

from ling_probe.analysis import ANALYSES
from ling_probe.analysis.promoted import promoted_tokens
from ling_probe.errors import UsageError
from ling_probe.expert_view import NEEDED, expert_facts, expert_list, in_context, largest_weights
from ling_probe.run import Run
from ling_probe.token_view import token_table

EFFECTS = pd.DataFrame(
    {
        "label": ["add", "add", "add", "take"],
        "kind": ["exclude", "exclude", "exclude", "route_as"],
        "dose": [2.0, 2.0, 1.0, 1.0],
        "experts": ["2.5 3.1", "2.5 3.1", "2.5", ""],
        "measure": ["selectivity", "own", "selectivity", "own"],
        "excess": [0.3, 0.4, 0.2, 0.1],
        "excess_low": [0.1, 0.2, 0.15, 0.0],
        "excess_high": [0.5, 0.6, 0.25, 0.2],
        "q": [0.01, 0.01, 0.02, 0.5],
    }
)


def tables_of(run, names=NEEDED):
    tables = {}
    for name in names:
        try:
            tables[name] = ANALYSES[name].function(run)
        except UsageError as error:
            tables[name] = error
    return tables


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    run = synthetic_run(
        tmp_path_factory.mktemp("planted") / "run",
        60,
        planted=Planted(2, 5, "add", boost=5.0),
        labels={"a": ("add", "take"), "b": ("add", "turn")},
        keep=("contribution", "lens"),
        parts=3,
    )
    return run, tables_of(run)


def test_the_list_holds_what_the_tables_say(planted):
    run, tables = planted
    listed = expert_list(run, tables)
    assert len(listed) == 3 * 16
    assert not listed.duplicated(["layer", "expert"]).any()
    load = tables["expert_load"]
    np.testing.assert_allclose(listed["load_ratio"], load["load"] * 16)
    np.testing.assert_allclose(
        2 ** listed["load_log2"], (load["count"] + 0.5) / (load["count"].groupby(load["layer"]).transform("sum") / 16 + 0.5)
    )
    np.testing.assert_array_equal(listed["group"], load["expert"] // 4)
    row = listed[(listed["layer"] == 2) & (listed["expert"] == 5)].iloc[0]
    found = tables["label_specialisation"].set_index(["layer", "expert", "label"]).loc[(2, 5, "add")]
    assert row["label"] == "add"
    assert (row["label_log2_ratio"], row["label_low"], row["label_q"]) == tuple(found[["log2_ratio", "ci_low", "q"]])
    for name, of, column in (("saliency", "expert_saliency", "saliency"), ("logits", "logit_attribution", "mean")):
        cells = tables[of].set_index(["layer", "expert"])[column]
        np.testing.assert_allclose(listed.set_index(["layer", "expert"])[name], cells)


def test_the_mean_weight_is_that_of_the_tokens(planted):
    run, tables = planted
    listed = expert_list(run, tables).set_index(["layer", "expert"])["weight"]
    total, count = np.zeros((3, 16)), np.zeros((3, 16))
    for batch in run.batches(weights=True):
        share = batch.weights / batch.weights.sum(axis=2, keepdims=True)
        for row in range(3):
            np.add.at(total[row], batch.expert_ids[:, row], share[:, row])
            np.add.at(count[row], batch.expert_ids[:, row], 1)
    np.testing.assert_allclose(listed.to_numpy().reshape(3, 16), total / count, rtol=2e-3)


def test_a_sure_preference_comes_before_a_larger_unsure_one(planted):
    run, tables = planted
    labels = pd.DataFrame(
        {
            "layer": 2, "expert": 5, "label": ["unsure", "sure", "averse"], "log2_ratio": [3.0, 1.0, -2.0],
            "ci_low": [2.0, 0.5, -3.0], "ci_high": [4.0, 1.5, -1.0], "q": [0.5, 0.01, 0.001],
        }
    )  # fmt: skip
    listed = expert_list(run, tables | {"label_specialisation": labels})
    row = listed[(listed["layer"] == 2) & (listed["expert"] == 5)].iloc[0]
    assert row["label"] == "sure"
    assert listed["label"].notna().sum() == 1


def test_causal_effects_are_told_of_the_experts_that_were_changed(planted):
    run, tables = planted
    listed = expert_list(run, tables | {"causal_effects": EFFECTS}).set_index(["layer", "expert"])
    assert listed["excess"].count() == 2
    assert tuple(listed.loc[(2, 5), ["excess", "excess_low", "excess_q"]]) == (0.2, 0.15, 0.02)
    assert listed.loc[(3, 1), "excess"] == 0.3
    found = expert_facts(run, 2, 5, tables | {"causal_effects": EFFECTS})["causal"]
    assert found["together"].tolist() == [2, 2, 1]
    assert "changed other experts" in str(expert_facts(run, 1, 0, tables | {"causal_effects": EFFECTS})["causal"])
    assert "excess" in expert_list(run, tables | {"causal_effects": EFFECTS.head(0)})


def test_a_list_without_more_tables_holds_the_load(planted):
    run, tables = planted
    listed = expert_list(run, {"expert_load": tables["expert_load"], "label_specialisation": UsageError("none")})
    assert "label" not in listed
    with pytest.raises(UsageError, match="expert_load was not asked for"):
        expert_list(run, {})


def test_the_largest_weights_are_those_of_a_plain_search(planted):
    run, _ = planted
    found = largest_weights(run, 2, top=3)
    every = []
    for sequence in range(60):
        for row in token_table(run, sequence, layer=2).itertuples():
            every += [(e, sequence, row.position, w) for e, w in zip(row.experts, row.weights, strict=True)]
    table = pd.DataFrame(every, columns=["expert", "sequence", "position", "weight"])
    table = table.sort_values(["expert", "weight", "sequence", "position"], ascending=[True, False, True, True])
    expected = table.drop_duplicates(["expert", "sequence"]).groupby("expert").head(3).reset_index(drop=True)
    pd.testing.assert_frame_equal(found[["expert", "sequence", "position"]], expected[["expert", "sequence", "position"]])
    np.testing.assert_allclose(found["weight"], expected["weight"])
    assert (found["layer"] == 2).all()


def test_of_equal_weights_the_first_token_stays(tmp_path):
    spec = synthetic_spec()
    traces = synthetic_traces(spec, 6, rng=np.random.default_rng(0))
    run = Run.create(tmp_path / "run", spec=spec, model={"name": "m"}, benchmark={"name": "b"}, options={})
    run.append([replace(trace, weights=np.full_like(trace.weights, 0.625)) for trace in traces])
    found = largest_weights(run, 1, top=2)
    for expert, rows in found.groupby("expert"):
        first = [
            (sequence, int(np.flatnonzero((trace.expert_ids[:, 0] == expert).any(axis=1))[0]))
            for sequence, trace in enumerate(traces)
            if (trace.expert_ids[:, 0] == expert).any()
        ]
        assert list(zip(rows["sequence"], rows["position"], strict=True)) == first[:2]


def test_a_context_is_the_text_around(planted):
    run, _ = planted
    rows = pd.DataFrame({"sequence": [7, 7, 12], "position": [0, 6, 9], "weight": [1.0, 0.5, 0.2]})
    found = in_context(run, rows, around=2)
    assert found["weight"].tolist() == [1.0, 0.5, 0.2]
    for row in found.itertuples():
        table = token_table(run, row.sequence, layer=1)
        tokens = table["token"].tolist()
        assert row.problem == run.sequences["sequence_id"][row.sequence]
        assert row.token == tokens[row.position]
        assert row.before == "".join(tokens[max(0, row.position - 2) : row.position])
        assert row.after == "".join(tokens[row.position + 1 : row.position + 3])
        assert row.label == table["label"][row.position]
    assert in_context(run, rows.head(0)).empty


def test_facts_are_the_rows_of_one_expert(planted):
    run, tables = planted
    facts = expert_facts(run, 2, 5, tables, promoted=promoted_tokens(run, 2, least=2))
    assert (facts["row"]["layer"], facts["row"]["expert"], facts["row"]["label"]) == (2, 5, "add")
    assert facts["labels"]["label"].iloc[0] == "add"
    assert len(facts["labels"]) == 3
    assert len(facts["families"]) == 2
    assert (facts["tokens"]["kind"] == "token").all()
    assert facts["tokens"]["pmi"].is_monotonic_decreasing
    company = tables["coactivation"]
    mine = company[(company["layer"] == 2) & ((company["expert"] == 5) | (company["other"] == 5))]
    assert len(facts["neighbours"]) == len(mine) == 15
    assert set(facts["neighbours"]["other"]) == set(range(16)) - {5}
    assert facts["neighbours"].set_index("other")["same_group"].sum() == 3
    assert facts["neighbours"]["lift"].sum() == pytest.approx(mine["lift"].sum())
    assert (facts["contexts"]["expert"] == 5).all()
    assert len(facts["contexts"]) == 8
    assert set(facts["promoted"]["expert"]) == {5}
    assert "no causal study" in str(facts["causal"])


def test_what_a_run_lacks_is_said(make_run):
    run = make_run(4, n_steps=(0, 0))
    facts = expert_facts(run, 1, 0, tables_of(run))
    assert "no step labels" in str(facts["labels"])
    assert "capture it with --keep lens" in str(facts["promoted"])
    for layer, expert in ((1, 16), (1, -1), (0, 3)):
        with pytest.raises(UsageError):
            expert_facts(run, layer, expert, {})
