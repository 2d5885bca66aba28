import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Effects, Planted, synthetic_spec, synthetic_traces

from ling_probe.errors import RoutingMismatch, UsageError
from ling_probe.trace import StepSpan

SPEC = synthetic_spec()


@pytest.fixture
def trace():
    return synthetic_traces(SPEC, 1, rng=np.random.default_rng(0), keep=("logits", "shared"))[0]


def edited(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_what_the_rule_routes_is_a_trace(seed):
    spec = synthetic_spec(n_experts=260, n_groups=10, topk_groups=3, top_k=6, routed_layers=(0, 3))
    for trace in synthetic_traces(spec, 2, rng=np.random.default_rng(seed), effects=Effects(token=3.0)):
        assert trace.expert_ids.dtype == np.uint16
        assert trace.n_tokens == len(trace.tokens)


@pytest.mark.parametrize("name", ["token_ids", "expert_ids", "weights", "segment", "step", "loss"])
def test_a_wrong_type_or_size_is_named(trace, name):
    array, n = getattr(trace, name), trace.n_tokens
    with pytest.raises(UsageError, match=rf"{name} of sequence arithmetic-0000 is float64 .*; {n} tokens of synthetic need"):
        replace(trace, **{name: array.astype(np.float64)})
    with pytest.raises(UsageError, match=rf"{name} of sequence arithmetic-0000 is {array.dtype} \[{n - 1}"):
        replace(trace, **{name: array[:-1]})


def test_no_tokens_no_trace(trace):
    with pytest.raises(UsageError, match="has no tokens"):
        replace(trace, tokens=())


def test_an_unknown_segment_code_is_refused(trace):
    with pytest.raises(UsageError, match="segment code 5; the codes are 0 prompt, 1 reasoning, 2 answer, 3 special, 4"):
        replace(trace, segment=edited(trace.segment, 0, 5))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 16], "expert 16 does not exist; there are 16"),
        ([0, 1, 2, 1], r"chosen twice in \[0, 1, 2, 1\]"),
        ([0, 5, 9, 1], "lie in 3 groups; synthetic chooses from 2 of 4"),
    ],
)
def test_a_choice_no_router_makes_is_located_by_layer_and_position(trace, ids, message):
    with pytest.raises(RoutingMismatch, match=f"^sequence arithmetic-0000, layer 2, position 7: .*{message}"):
        replace(trace, expert_ids=edited(trace.expert_ids, (7, 1), ids))


def test_experts_forced_from_outside_the_groups_are_allowed_when_said(trace):
    ids = edited(trace.expert_ids, (7, 1), [0, 5, 9, 1])
    assert replace(trace, expert_ids=ids, group_limited=False).expert_ids[7, 1].tolist() == [0, 5, 9, 1]


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [3, -0.5, 0, 0], [np.nan, 1, 1, 0.5], [0.6, 0.6, 0.6, 0.67]])
def test_weights_must_share_out_the_scale(trace, weights):
    with pytest.raises(RoutingMismatch, match=r"layer 3, position 0: weights .* are not 4 shares that sum to 2\.5"):
        replace(trace, weights=edited(trace.weights, (0, 2), weights))


def test_weights_rounded_to_sixteen_bits_are_accepted(trace):
    bfloat = (trace.weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.abs(bfloat.sum(-1) - 2.5).max() > 1e-3
    replace(trace, weights=bfloat)


def test_steps_are_inside_the_sequence_in_order_and_apart(trace):
    first, second, *rest = trace.steps
    late = replace(trace.steps[-1], stop=trace.n_tokens + 1)
    for steps in [(second, first, *rest), (first, replace(second, start=second.start - 1), *rest), (*trace.steps[:-1], late)]:
        with pytest.raises(UsageError, match="numbered in order and do not overlap"):
            replace(trace, steps=steps)


def test_steps_and_step_codes_must_say_the_same(trace):
    start = trace.steps[1].start
    with pytest.raises(UsageError, match=f"position {start} of sequence arithmetic-0000 is marked step 0; .* put it in 1"):
        replace(trace, step=edited(trace.step, start, 0))


def test_a_step_may_hold_no_token(trace):
    end = trace.steps[-1].stop
    empty = StepSpan(step=len(trace.steps), label="add", text="", start=end, stop=end)
    assert len(replace(trace, steps=(*trace.steps, empty)).steps) == len(trace.steps) + 1


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (
            {"logits": np.zeros((5, 3, 16))},
            "extra 'logits' of sequence arithmetic-0000 is float64 [5, 3, 16]; expected floats [",
        ),
        ({"experts": np.zeros((5, 3))}, "extra 'experts' of sequence arithmetic-0000 cannot name a column"),
        ({"a b": np.zeros((5, 3))}, "extra 'a b' of sequence arithmetic-0000 cannot name a column"),
    ],
)
def test_extras_fit_tokens_rows_and_column_names(trace, extras, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        replace(trace, extras=extras)


def test_extras_of_known_names_have_known_sizes(trace):
    with pytest.raises(UsageError, match=r"extra 'contribution' .* expected floats .*, 3, 4\]"):
        replace(trace, extras={"contribution": np.zeros((trace.n_tokens, 3, 5))})
    with pytest.raises(UsageError, match=r"extra 'shared' .* is int64"):
        replace(trace, extras={"shared": np.zeros((trace.n_tokens, 3), np.int64)})


def test_a_planted_effect_raises_the_rate_of_its_expert_at_its_label_only():
    rng, plant = np.random.default_rng(1), Planted(2, 5, "premise", boost=4.0)
    traces = synthetic_traces(SPEC, 60, rng=rng, planted=plant)
    labels = np.concatenate([np.array([*(span.label for span in trace.steps), ""])[trace.step] for trace in traces])
    chosen = np.concatenate([(trace.expert_ids == 5).any(-1) for trace in traces])
    at, elsewhere = chosen[labels == "premise"].mean(0), chosen[labels != "premise"].mean(0)
    assert at[1] > 0.6
    assert elsewhere[1] < 0.35
    assert np.abs(at - elsewhere)[[0, 2]].max() < 0.08


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_a_norm_that_is_none_is_located(trace, wrong):
    residual = edited(np.ones((trace.n_tokens, 4), np.float32), (2, 3), wrong)
    with pytest.raises(UsageError, match=r"'residual' of sequence arithmetic-0000, layer 3, position 2 .* a norm is finite"):
        replace(trace, extras={"residual": residual})
    replace(trace, extras={"lens": np.full((trace.n_tokens, 3, 4), wrong)})


def test_residual_norms_are_of_every_decoder_layer(trace):
    with pytest.raises(UsageError, match=rf"expected floats \[{trace.n_tokens}, 4\]"):
        replace(trace, extras={"residual": np.ones((trace.n_tokens, 3))})
