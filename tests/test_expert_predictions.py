import numpy as np
import pandas as pd
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe.analysis import ANALYSES, Verdict, expert_prediction, routing_prediction
from ling_probe.charts import FIGURES

BY_TOKEN = Effects(token=3.0)


@pytest.fixture(scope="module")
def by_token(tmp_path_factory):
    """Routing follows the token, except for one expert of one layer that follows the step label alone."""
    plants = (Planted(2, 5, "multiply", 9.0),)
    return synthetic_run(tmp_path_factory.mktemp("predicted") / "run", 150, planted=plants, effects=BY_TOKEN)


@pytest.fixture(scope="module")
def table(by_token):
    return expert_prediction(by_token, draws=100)


def test_losses_add_up_to_those_of_the_layer(by_token, table):
    """Summed over experts, losses are those that `routing_prediction` gives per chosen expert."""
    layers = routing_prediction(by_token, draws=2).set_index(["layer", "known"])
    chosen = table.groupby(["layer", "known"])["chosen"].sum()
    hits = (table["recall"].fillna(0) * table["chosen"]).groupby([table["layer"], table["known"]]).sum()
    for key in chosen.index:
        assert chosen[key] == 4 * layers.loc[key, "tested"]
        assert hits[key] / chosen[key] == pytest.approx(layers.loc[key, "recall"], abs=1e-9)


def test_load_explains_nothing_and_the_token_what_it_decides(table):
    load, token = (table[table["known"] == known] for known in ("load", "token"))
    assert load["explained"].abs().max() < 1e-12
    assert token["explained"].median() > 0.3
    assert ((token["ci_low"] <= token["explained"]) & (token["explained"] <= token["ci_high"])).all()
    assert (token["beyond_token"] == 0).all()


def test_an_expert_that_follows_the_label_stands_out(table):
    by = table.set_index(["layer", "expert", "known"])
    label = by.loc[(2, 5, "token and step label")]
    assert label["beyond_low"] > 0.05
    others = table[(table["known"] == "token and step label") & ~((table["layer"] == 2) & (table["expert"] == 5))]
    assert others["beyond_token"].max() < label["beyond_token"]
    best = table[table["known"] == "step label"].nlargest(1, "explained").iloc[0]
    assert (best["layer"], best["expert"]) == (2, 5)


def test_the_finding_tells_the_least_from_the_most(by_token, table):
    found = ANALYSES["expert_prediction"].finding(table)
    assert found.token_effect == pytest.approx(table[table["known"] == "token"]["explained"].median())
    assert found.verdict is Verdict.NOT_SUPPORTED
    ordered = ANALYSES["expert_prediction"].order(table)
    assert ordered["known"].iloc[0] == "token"
    assert ordered["explained"].iloc[0] == table[table["known"] == "token"]["explained"].min()
    figure = FIGURES["expert_prediction"](table, by_token.spec)[0]
    assert sum(len(trace.x) for trace in figure.data) == 48
    none = ANALYSES["expert_prediction"].finding(table.assign(chosen=0))
    assert none.verdict is Verdict.CANNOT_TELL


def test_few_sequences_give_no_interval(make_run):
    table = expert_prediction(make_run(6), draws=10)
    assert table["ci_low"].isna().all()
    assert np.isfinite(table["explained"]).all()
    assert isinstance(table, pd.DataFrame)
