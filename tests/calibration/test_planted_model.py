"""From weights to verdict: a model whose experts fire on operations by construction, captured and analysed as any other."""

import numpy as np
import pytest
from planted_model import OPERATIONS, planted_model, problems, shuffled_labels, truth

from ling_probe.analysis import ANALYSES, label_specialisation
from ling_probe.analysis.question import DISCOVERY, Verdict
from ling_probe.analysis.specialisation import LEAST_EFFECT
from ling_probe.recording import record


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("model") / "planted")


def cells(table):
    return set(zip(table["layer"], table["expert"], table["label"], strict=True))


def found(table):
    """Preferences worth having: corrected p below 0.05 and the whole interval above one and a half times as often."""
    return cells(table[(table["q"] < DISCOVERY) & (table["ci_low"] > LEAST_EFFECT)])


def verdict(table):
    return ANALYSES["label_specialisation"].finding(table).verdict


def test_planted_experts_are_found_and_no_others(model, tmp_path):
    assert model.verification.differ == 0
    table = label_specialisation(record(model, problems(60), tmp_path / "run"))
    assert len(truth()) == 18
    assert found(table) == truth()
    assert verdict(table) is Verdict.SUPPORTED
    planted = {(layer, expert) for layer, expert, _ in truth()}
    avoided = cells(table[(table["q"] < DISCOVERY) & (table["ci_high"] < -LEAST_EFFECT)])
    assert avoided == {(*expert, label) for expert in planted for label in OPERATIONS} - truth()
    mine = [(layer, expert) in planted for layer, expert in zip(table["layer"], table["expert"], strict=True)]
    others = table[~np.array(mine)]
    assert (others["p"] <= 0.05).mean() < 0.06
    assert (others["q"] < DISCOVERY).mean() < 0.02


def test_words_do_not_give_the_operation_away(model, tmp_path):
    """Each word but the first of a step is as often in one operation as in another, and the first counts for nothing."""
    run = record(model, problems(60), tmp_path / "run")
    table = label_specialisation(run)
    assert table["overlap"].between(0.6, 0.9).all()
    firsts = {step.split()[0] for step in run.steps["text"]}
    assert firsts == set(OPERATIONS.values())


def test_nothing_is_found_in_labels_shuffled_over_the_steps(model, tmp_path):
    table = label_specialisation(record(model, shuffled_labels(problems(60)), tmp_path / "run"))
    assert not (table["q"] < DISCOVERY).any()
    assert verdict(table) is not Verdict.SUPPORTED
    assert 0.02 < (table["p"] <= 0.05).mean() < 0.08


def test_nothing_is_found_where_routers_do_not_read_the_operation(tmp_path):
    model = planted_model(tmp_path / "model", planted=False)
    table = label_specialisation(record(model, problems(60), tmp_path / "run"))
    assert not (table["q"] < DISCOVERY).any()
    assert verdict(table) is not Verdict.SUPPORTED
