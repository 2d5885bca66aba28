from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from synthetic import Planted, synthetic_spec, synthetic_traces

from ling_probe.analysis import ANALYSES, Verdict, answer_prediction
from ling_probe.analysis.solutions import DECODERS, _auroc, _swapped_p
from ling_probe.charts import FIGURES
from ling_probe.errors import UsageError
from ling_probe.run import Run

LAST = list(DECODERS)[-1]


def run_of(folder, n=120, *, seed=0, boost=0.0):
    """Wrong solutions route to expert 5 of layer 2 more often, by so much in logits; nothing else tells them."""
    rng = np.random.default_rng(seed)
    spec = synthetic_spec()
    families = {"arithmetic": ("add", "multiply"), "wrong": ("add", "multiply")}
    plants = (Planted(2, 5, "wrong", boost),) if boost else ()
    made = synthetic_traces(spec, n, rng=rng, planted=plants, labels=families)
    traces = [
        replace(trace, correct=trace.family != "wrong", family="arithmetic", sequence_id=f"s{place}")
        for place, trace in enumerate(made)
    ]
    run = Run.create(folder, spec=spec, model={}, benchmark={}, options={})
    run.append(traces)
    return run


def test_a_planted_trace_of_wrong_answers_is_found_beyond_length_loss_and_words(tmp_path):
    run = run_of(tmp_path / "run", boost=3.0)
    table = answer_prediction(run, draws=200, swaps=199)
    by = table.set_index("features")
    assert by.loc["routing", "auroc"] > 0.8
    assert by.loc["routing", "ci_low"] > 0.6
    assert 0.35 < by.loc["length, loss and words", "auroc"] < 0.65
    assert by.loc[LAST, "gain"] == pytest.approx(by.loc[LAST, "auroc"] - by.loc["length, loss and words", "auroc"])
    assert by["gain"].notna().sum() == 1
    found = ANALYSES["answer_prediction"].finding(table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 4)
    assert found.sentence.startswith("60 wrong against 60 right solutions")
    assert FIGURES["answer_prediction"](table, run.spec)[0].data[0].x.tolist() == table["auroc"].tolist()


def test_routing_that_knows_nothing_adds_nothing(tmp_path):
    tables = [answer_prediction(run_of(tmp_path / str(seed), 60, seed=seed), draws=20, swaps=99) for seed in range(20)]
    p = np.array([table["p"].iloc[-1] for table in tables])
    assert (p <= 0.05).sum() <= 4
    routing = np.array([table.set_index("features").loc["routing", "auroc"] for table in tables])
    assert routing.mean() == pytest.approx(0.5, abs=0.06)


def test_auroc_compares_inside_families_and_follows_the_weights():
    rng = np.random.default_rng(0)
    score, wrong, family = rng.normal(size=40).round(1), rng.random(40) < 0.4, np.zeros(40, int)
    even = np.ones((1, 40))
    assert _auroc(score, wrong, family, even)[0] == pytest.approx(roc_auc_score(wrong, score))
    twice = np.ones((1, 40))
    twice[0, 3] = 2
    repeated = np.append(np.arange(40), 3)
    assert _auroc(score, wrong, family, twice)[0] == pytest.approx(roc_auc_score(wrong[repeated], score[repeated]))
    # A shift of a whole family changes nothing.
    family[20:] = 1
    shifted = score + 100 * family
    assert _auroc(shifted, wrong, family, even) == pytest.approx(_auroc(score, wrong, family, even))


def test_the_swap_tells_a_better_score_from_an_equal_one():
    rng = np.random.default_rng(1)
    wrong, family = np.arange(100) < 50, np.zeros(100, int)
    good, noise, other = wrong + rng.normal(0, 0.5, 100), rng.normal(size=100), rng.normal(size=100)
    assert _swapped_p(good, noise, wrong, family, 199, 0) == 0.005
    assert _swapped_p(noise, other, wrong, family, 199, 0) > 0.05
    assert _swapped_p(noise, noise, wrong, family, 199, 0) == 1


def test_too_few_of_a_kind_are_refused(tmp_path):
    with pytest.raises(UsageError, match="9 right and 9 wrong solutions in families that have both"):
        answer_prediction(run_of(tmp_path / "run", 18))
