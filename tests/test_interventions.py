import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import synthetic_spec

from ling_probe.errors import InterventionError
from ling_probe.interventions import Intervention, bias, check, check_all, exclude, force, route_with, silence
from ling_probe.routing import choose, chosen_weights, route, scores

SPEC = synthetic_spec()
RNG = np.random.default_rng(0)
LOGITS, BIAS = RNG.normal(0, 1, (60, 16)), RNG.normal(0, 0.2, 16)
PLAIN = route(LOGITS, BIAS, SPEC)


def routed(*interventions, **scope):
    return route_with(interventions, LOGITS, BIAS, SPEC, layer=2, **scope)


@st.composite
def interventions(draw):
    kind = draw(st.sampled_from(["exclude", "silence", "force", "bias"]))
    some = {"segments": ["prompt", "answer"], "labels": ["add", "premise"], "positions": [3, 1]}
    scope = {name: tuple(values) for name, values in some.items() if draw(st.booleans())}
    value = draw(st.floats(0.01, 5.0)) if kind == "bias" else 0.0
    experts = tuple(draw(st.lists(st.integers(0, 15), min_size=1, max_size=4)))
    return Intervention(kind=kind, layer=draw(st.integers(1, 3)), experts=experts, value=value, **scope)


@given(interventions())
def test_json_keeps_an_intervention(intervention):
    assert Intervention.from_dict(json.loads(json.dumps(intervention.to_dict()))) == intervention


def test_values_are_equal_whatever_order_they_were_given_in():
    assert exclude(2, [5, 3, 5]) == exclude(2, (3, 5))
    assert exclude(2, np.array([3, 5]), positions=[4, 1]) == exclude(2, [3, 5], positions=(1, 4))
    assert exclude(2, [3]) != silence(2, [3])
    assert exclude(2, [3]) != exclude(2, [3], labels=["add"])
    assert exclude(2, [3]).to_dict() == {"kind": "exclude", "layer": 2, "experts": [3], "value": 0.0}


def test_without_interventions_on_the_layer_nothing_changes():
    elsewhere = route_with([exclude(1, [0, 1])], LOGITS, BIAS, SPEC, layer=2)
    np.testing.assert_array_equal(elsewhere.ids, PLAIN.ids)
    np.testing.assert_array_equal(elsewhere.weights, PLAIN.weights)


def test_excluded_experts_are_never_chosen_and_the_next_best_step_in():
    routing = routed(exclude(2, [3, 9]))
    assert (PLAIN.ids == 3).any()
    assert not np.isin(routing.ids, [3, 9]).any()
    np.testing.assert_allclose(routing.weights.sum(-1), 2.5)
    choice = scores(LOGITS) + BIAS
    choice[:, [3, 9]] = -np.inf
    np.testing.assert_array_equal(routing.ids, choose(choice, SPEC))


def test_silenced_experts_keep_slot_and_weight():
    routing = routed(silence(2, [3, 9]))
    np.testing.assert_array_equal(routing.ids, PLAIN.ids)
    np.testing.assert_array_equal(routing.weights, PLAIN.weights)


def test_forced_experts_replace_the_lowest_ranked():
    routing = routed(force(2, [7, 3]))
    for before, after in zip(PLAIN.ids.tolist(), routing.ids.tolist(), strict=True):
        missing = [expert for expert in (3, 7) if expert not in before]
        staying = [expert for expert in before if expert in (3, 7)]
        others = [expert for expert in before if expert not in (3, 7)][:2]
        assert after == [expert for expert in before if expert in staying + others] + missing
    np.testing.assert_allclose(routing.weights, chosen_weights(scores(LOGITS), routing.ids, SPEC))


def test_bias_moves_the_choice_and_not_the_weights():
    routing = routed(bias(2, [6], 10.0))
    assert (routing.ids[:, 0] == 6).all()
    np.testing.assert_allclose(routing.weights, chosen_weights(scores(LOGITS), routing.ids, SPEC))
    assert not (routed(bias(2, [6], -10.0)).ids == 6).any()


def test_exclusion_wins_over_any_bias():
    assert not (routed(exclude(2, [6]), bias(2, [6], 10.0)).ids == 6).any()


def test_scopes_narrow_where_an_intervention_acts():
    segments = ["prompt"] * 20 + ["reasoning"] * 40
    labels = [""] * 20 + ["add"] * 10 + ["subtract"] * 30
    everywhere = routed(exclude(2, [3])).ids
    for scope, rows in [
        ({"segments": ["prompt"]}, slice(0, 20)),
        ({"labels": ["add"]}, slice(20, 30)),
        ({"positions": range(5, 8)}, slice(5, 8)),
        ({"segments": ["reasoning"], "positions": range(15, 25)}, slice(20, 25)),
    ]:
        expected = PLAIN.ids.copy()
        expected[rows] = everywhere[rows]
        np.testing.assert_array_equal(routed(exclude(2, [3], **scope), segments=segments, labels=labels).ids, expected)


def test_a_scope_that_is_not_known_is_not_ignored():
    with pytest.raises(InterventionError, match="exclude at layer 2 acts on some labels only, and none are known here"):
        routed(exclude(2, [3], labels=["add"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exclude(2, []), "empty list"),
        (lambda: exclude(2, [1], labels=[]), "empty list"),
        (lambda: exclude(2, [1], tokens=[3]), "no scope is called tokens; there are segments, labels, positions"),
        (lambda: exclude(2, [1], segments=["resoning"]), "names segment resoning; there are prompt, reasoning"),
        (lambda: bias(2, [1], 0.0), "value 0.0; expected a finite value other than 0"),
        (lambda: bias(2, [1], float("nan")), "expected a finite value other than 0"),
        (lambda: Intervention(kind="force", layer=2, experts=(1,), value=1.0), "expected no value; only bias has one"),
        (lambda: Intervention(kind="ablate", layer=2, experts=(1,)), "'ablate'; there are exclude, silence, force, bias"),
        (lambda: Intervention.from_dict({"kind": "force", "layer": 2}), "an intervention lacks experts"),
        (lambda: Intervention.from_dict({"kind": "force", "layer": 2, "experts": [1], "head": 3}), "unknown head"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(InterventionError, match=message):
        make()


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (exclude(0, [1]), "layer 0 of synthetic has no router; these do: 1, 2, 3"),
        (silence(2, [16]), "expert 16 does not exist in synthetic; its experts are 0-15"),
        (silence(2, [-1]), "expert -1 does not exist"),
        (force(2, range(5)), "5 experts are forced at layer 2, and synthetic chooses 4"),
        (
            exclude(2, [0, 1, 4, 5, 6, 8, 9, 10, 12, 13, 14]),
            "can leave 2 to choose from in the 2 groups kept, and 4 are chosen",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(intervention, message):
    with pytest.raises(InterventionError, match=message):
        check(intervention, SPEC)


@given(st.sets(st.integers(0, 15), min_size=1, max_size=15))
def test_exclusion_that_passes_always_leaves_enough(excluded):
    try:
        check(exclude(2, excluded), SPEC)
    except InterventionError:
        return
    ids = routed(exclude(2, excluded)).ids
    assert not np.isin(ids, list(excluded)).any()


def test_interventions_are_checked_together_where_they_can_meet():
    halves = [exclude(2, [0, 1, 4, 5]), exclude(2, [6, 8, 9, 10, 12, 13, 14])]
    for each in halves:
        check(each, SPEC)
    with pytest.raises(InterventionError, match="excluding 11 experts at layer 2"):
        check_all(halves, SPEC)
    check_all([exclude(2, [0, 1, 4, 5], segments=["prompt"]), exclude(2, halves[1].experts, segments=["answer"])], SPEC)
    with pytest.raises(InterventionError, match="expert 7 of layer 2 is both excluded and forced"):
        check_all([exclude(2, [7]), force(2, [7, 1], labels=["add"])], SPEC)
    check_all([exclude(2, [7]), force(3, [7])], SPEC)
    with pytest.raises(InterventionError, match="6 experts are forced"):
        check_all([force(2, [1, 2, 3]), force(2, [4, 5, 6])], SPEC)
