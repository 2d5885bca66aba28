import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import synthetic_spec, synthetic_traces

from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.token_view import (
    LONGEST,
    colourings,
    example_sequence,
    layers_figure,
    leading_experts,
    problem_facts,
    problem_table,
    sequence_choices,
    token_layers,
    token_scale,
    token_table,
    visible_pieces,
)


@pytest.fixture
def run(make_run) -> Run:
    return make_run(7, parts=3)


@pytest.fixture
def traces():
    return synthetic_traces(synthetic_spec(), 7, rng=np.random.default_rng(0))


def test_problems_stand_in_the_order_of_the_run(run, traces):
    problems = problem_table(run)
    assert problems["sequence_id"].tolist() == [trace.sequence_id for trace in traces] == run.sequences["sequence_id"].tolist()
    assert problems["correct"].tolist() == [trace.correct for trace in traces]
    assert problem_table(Run.open(run.folder)).equals(problems)


def test_an_empty_run_has_no_problems(make_run):
    assert problem_table(make_run(0)).empty


@pytest.mark.parametrize("sequence", range(7))
def test_tokens_are_those_of_the_trace(run, traces, sequence):
    trace, row = traces[sequence], 1
    table = token_table(run, sequence, layer=2)
    assert table["position"].tolist() == list(range(trace.n_tokens))
    assert table["token"].tolist() == list(trace.tokens)
    assert table["step"].tolist() == trace.step.tolist()
    np.testing.assert_array_equal(table["loss"], trace.loss)
    for position, found in enumerate(table.itertuples()):
        weights = trace.weights[position, row]
        by_weight = sorted(zip(weights, trace.expert_ids[position, row], strict=True), key=lambda pair: -pair[0])
        assert found.expert == found.experts[0] == trace.expert_ids[position, row, weights.argmax()]
        assert sorted(found.experts) == sorted(trace.expert_ids[position, row].tolist())
        np.testing.assert_allclose(found.weights, [weight for weight, _ in by_weight], rtol=1e-3)
        assert found.weight == found.weights[0]


def test_steps_bring_their_label_and_verdict(run, traces):
    table = token_table(run, 4, layer=1)
    for span in traces[4].steps:
        here = table[table["step"] == span.step]
        assert here["position"].tolist() == list(range(span.start, span.stop))
        assert set(here["label"]) == {span.label}
        assert set(here["step_correct"]) == {span.correct}
    outside = table[table["step"] == -1]
    assert set(outside["label"]) == {""}
    assert outside["step_correct"].isna().all()


def test_a_token_through_all_layers(run, traces):
    table = token_layers(sequence_choices(run, 3), 5)
    assert table["layer"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert table["rank"].tolist() == [0, 1, 2, 3] * 3
    for found in table.itertuples():
        row = run.spec.row(found.layer)
        assert found.expert == traces[3].expert_ids[5, row, found.slot]
        assert found.weight == pytest.approx(traces[3].weights[5, row, found.slot], rel=1e-3)
    assert (table.groupby("layer")["weight"].diff().fillna(0) <= 0).all()


def test_facts_are_one_row_of_the_sequences(run):
    assert problem_facts(run, 5) == run.sequences.astype({"correct": object}).iloc[5].to_dict()


def test_what_is_not_there_is_named(run):
    with pytest.raises(UsageError, match=r"has no sequence 7; it holds 7"):
        token_table(run, 7, layer=1)
    with pytest.raises(UsageError, match=r"has no position 900"):
        token_layers(sequence_choices(run, 0), 900)
    with pytest.raises(UsageError, match=r"layer 0 of synthetic has no router"):
        token_table(run, 0, layer=0)


def test_only_the_part_of_the_problem_is_opened(run):
    (run.folder / "parts/00001/tokens.parquet").write_bytes(b"PAR1 nothing")
    assert len(token_table(run, 0, layer=1))
    with pytest.raises(RunError, match=r"00001/tokens.parquet cannot be read .*damaged"):
        token_table(run, 3, layer=1)


def test_tokens_of_another_run_are_damage(make_run, run):
    other = make_run(7, parts=3, labels={"elsewhere": ("add", "take")})
    (run.folder / "parts/00000/tokens.parquet").write_bytes((other.folder / "parts/00000/tokens.parquet").read_bytes())
    with pytest.raises(RunError, match=r"00000/tokens.parquet has no tokens of arithmetic-0000; it is damaged"):
        token_table(run, 0, layer=1)


@pytest.fixture
def routed(make_run) -> Run:
    return make_run(7, parts=3, keep=("logits", "contribution"))


@pytest.fixture
def routed_traces():
    return synthetic_traces(synthetic_spec(), 7, rng=np.random.default_rng(0), keep=("logits", "contribution"))


def test_contributions_stand_beside_their_experts(routed, routed_traces, run):
    trace = routed_traces[2]
    for position, found in enumerate(token_table(routed, 2, layer=3).itertuples()):
        by_expert = dict(zip(trace.expert_ids[position, 2], trace.extras["contribution"][position, 2], strict=True))
        np.testing.assert_allclose(found.contributions, [by_expert[expert] for expert in found.experts], rtol=1e-3)
    assert token_table(run, 2, layer=3)["contributions"].isna().all()


def test_entropy_is_of_the_scores_or_else_of_the_weights(routed, routed_traces, run):
    trace = routed_traces[5]
    for there, numbers, words in (
        (routed, 1 / (1 + np.exp(-trace.extras["logits"][:, 1].astype(float))), "the router's scores"),
        (run, trace.weights[:, 1].astype(float), "the chosen weights"),
    ):
        scale = token_scale(there, 5, layer=2, by="entropy")
        plain = [-sum(p * np.log(p) for p in row / row.sum() if p > 0) / np.log(len(row)) for row in numbers]
        if there is routed:
            np.testing.assert_allclose(scale.values, plain, rtol=1e-3)
            assert (scale.low, scale.high) == (scale.values.min(), scale.values.max())
        assert words in scale.name


def test_the_margin_is_that_of_the_choice(routed, routed_traces):
    trace, spec = routed_traces[1], routed.spec
    bias = np.array(routed.manifest.model["expert_bias"]["2"])
    scale = token_scale(routed, 1, layer=2, by="margin")
    for position, value in enumerate(scale.values):
        choice = 1 / (1 + np.exp(-trace.extras["logits"][position, 1].astype(float))) + bias
        groups = choice.reshape(spec.n_groups, -1)
        kept = np.argsort(np.sort(groups, axis=1)[:, -2:].sum(axis=1))[-spec.topk_groups :]
        inside = np.sort(groups[kept].ravel())[::-1]
        assert value == pytest.approx(inside[spec.top_k - 1] - inside[spec.top_k], abs=2e-3)
    assert scale.low == 0
    assert scale.levels.max() == 1


def test_the_loss_is_as_recorded(run, traces):
    scale = token_scale(run, 3, layer=1, by="loss")
    np.testing.assert_array_equal(scale.values, traces[3].loss.astype(float))
    assert np.isnan(scale.levels[-1])
    assert np.nanmax(scale.levels) == 1


def test_agreement_counts_common_experts_of_the_same_text(make_run, run):
    same, other = make_run(5, parts=1), make_run(7, parts=2, seed=4)
    assert set(token_scale(run, 3, layer=1, by="agreement", against=same).values) == {1.0}
    ours, theirs = token_table(run, 3, layer=2), token_table(other, 3, layer=2)
    values = token_scale(run, 3, layer=2, by="agreement", against=other).values
    read = 0
    while read < min(len(ours), len(theirs)) and ours["token"][read] == theirs["token"][read]:
        assert values[read] == len(set(ours["experts"][read]) & set(theirs["experts"][read])) / 4
        read += 1
    assert np.isnan(values[read:]).all()


def test_what_cannot_be_coloured_is_said(make_run, run):
    assert colourings(run, compared=False) == ("expert", "entropy", "loss")
    assert colourings(make_run(3, keep=("logits",)), compared=True) == ("expert", "entropy", "margin", "loss", "agreement")
    with pytest.raises(UsageError, match=r'no "margin"; colour by one of expert, entropy, loss'):
        token_scale(run, 0, layer=1, by="margin")
    with pytest.raises(UsageError, match=r"has no problem arithmetic-0006"):
        token_scale(run, 6, layer=1, by="agreement", against=make_run(3))
    with pytest.raises(UsageError, match="only runs of one geometry compare"):
        token_scale(run, 0, layer=1, by="agreement", against=make_run(3, spec=synthetic_spec(n_experts=32)))


def test_one_sequence_is_found_across_row_groups(run, tmp_path):
    path = run.folder / "parts/00001/tokens.parquet"
    table = pq.read_table(path)
    whole = token_table(run, 4, layer=1)
    pq.write_table(table, path, row_group_size=7)
    pd.testing.assert_frame_equal(token_table(run, 4, layer=1), whole)


def test_a_token_longer_than_any_word_is_cut():
    pieces = visible_pieces("ab" * 2**19)
    assert pieces == [("ab" * 100, False), ("‹… and 1,048,376 more›", True)]


def test_the_legend_counts_leading_experts():
    tokens = pd.DataFrame({"expert": [9, 9, 9, 1, 1, 4, 5]})
    legend = leading_experts(tokens, colours=4)
    assert legend["expert"].tolist() == [9, 1, 4, 5]
    assert legend["tokens"].tolist() == [3, 2, 1, 1]
    # 9 has colour 1 of 4, which 1 would have too; 4 has its own; 5 takes what is left.
    assert legend["colour"].tolist() == [1, 2, 0, 3]
    assert leading_experts(tokens, colours=2)["expert"].tolist() == [9, 1]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=60), st.integers(1, 8))
def test_colours_are_distinct_and_follow_the_number_where_they_can(experts, colours):
    legend = leading_experts(pd.DataFrame({"expert": experts}), colours=colours)
    assert legend["colour"].is_unique
    assert legend["colour"].between(0, colours - 1).all()
    assert legend["colour"].iloc[0] == legend["expert"].iloc[0] % colours


def test_the_example_has_most_steps_of_its_label(run):
    steps = run.steps
    counts = steps[steps["label"] == "add"].groupby("sequence").size()
    assert counts[example_sequence(run, "add")] == counts.max()
    with pytest.raises(UsageError, match='no step labelled "subtle"'):
        example_sequence(run, "subtle")


def test_the_figure_shows_weights_and_names_experts(run):
    table = token_layers(sequence_choices(run, 2), 0)
    heat = layers_figure(table).data[0]
    np.testing.assert_array_equal(np.asarray(heat.z).ravel(), table["weight"])
    np.testing.assert_array_equal(np.asarray(heat.text).ravel(), table["expert"])


def test_what_cannot_be_seen_is_shown():
    assert visible_pieces("") == []
    assert visible_pieces("a\tb") == [("a", False), ("⇥", True), ("b", False)]
    assert visible_pieces("\u202e\u200b\u00a0") == [("‹202E›", True), ("‹200B›", True), ("‹00A0›", True)]


@given(st.text(max_size=LONGEST))
def test_nothing_invisible_is_left(text):
    assert all(letter.isprintable() and letter != " " for piece, _ in visible_pieces(text) for letter in piece)
    assert "".join(piece for piece, stands_for in visible_pieces(text) if not stands_for) == "".join(
        letter for letter in text if letter.isprintable() and letter != " "
    )
