"""Labels told from routing: in other words, early in a step, and by which experts."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, write_run
from synthetic import Effects, Planted, synthetic_run, synthetic_spec

from ling_probe.analysis import Verdict, carriers, decoders, finding, label_carriers, label_onset, onset, operation_transfer
from ling_probe.analysis.carriers import CHOSEN, EXPERT, LAYER, RANDOM
from ling_probe.analysis.decoders import ALL, ROUTING, TOKENS
from ling_probe.errors import UsageError

TALK = {"talk": ("plan", "check", "conclude", "recall")}
PLANTS = tuple(Planted(layer, 3 * place, label, 3.0) for layer in (1, 2, 3) for place, label in enumerate(TALK["talk"]))


def told(table):
    return table.set_index("features")


def run_of(folder, n=60, *, seed, name="synthetic", **options):
    traces = plain_traces(n, seed=seed, **({"labels": TALK} | options))
    return write_run(folder, [replace(each, sequence_id=f"{seed}-{each.sequence_id}") for each in traces], name=name)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("operations") / "run", 70, labels=TALK, planted=PLANTS)


def test_what_routing_knows_in_other_problems_is_carried_across(tmp_path):
    runs = [run_of(tmp_path / str(seed), seed=seed, planted=PLANTS) for seed in (1, 2)]
    table = operation_transfer(runs, draws=200, permutations=199)
    rows = told(table)
    assert rows.loc[ROUTING, "ci_low"] > 0.5
    assert rows.loc[ROUTING, "bits"] == pytest.approx(rows.loc[ROUTING, "home"], abs=0.4)
    assert rows.loc[ROUTING, "p"] == 0.005
    assert rows.loc[TOKENS, "ci_high"] < 0.1
    assert rows.loc[ALL, "gain_low"] > 0.5
    assert (table["learnt_sequences"] == 60).all()
    assert table["steps"].iloc[0] == len(runs[1].steps)
    found = finding("operation_transfer", table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 4)


def test_what_only_the_first_run_does_is_not_carried_across(tmp_path):
    turned = tuple(replace(plant, expert=(plant.expert + 8) % 16) for plant in PLANTS)
    runs = [run_of(tmp_path / str(seed), seed=seed, planted=plants) for seed, plants in ((1, PLANTS), (2, turned))]
    rows = told(operation_transfer(runs, draws=50, permutations=19))
    assert rows.loc[ROUTING, "home"] > 0.5
    assert rows.loc[ROUTING, "bits"] < 0
    assert rows.loc[ALL, "gain"] < 0


def test_runs_between_which_nothing_transfers_are_refused(tmp_path):
    first = run_of(tmp_path / "one", 12, seed=1)
    with pytest.raises(UsageError, match=r"every problem of .* is in .* too; a decoder is judged on problems"):
        operation_transfer([first, run_of(tmp_path / "same", 12, seed=1)])
    with pytest.raises(UsageError, match="0 step labels in common between"):
        operation_transfer([first, run_of(tmp_path / "other", 12, seed=2, labels={"sums": ("add", "subtract")})])
    with pytest.raises(UsageError, match="a comparison needs two runs"):
        operation_transfer([first])
    with pytest.raises(UsageError, match="share no text, so nothing tells whether their experts are numbered alike"):
        operation_transfer([first, run_of(tmp_path / "model", 12, seed=2, name="another")])


def test_shuffled_labels_give_the_exact_law():
    predicted = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    codes, one = np.array([0, 0, 1, 1]), np.zeros(4, int)
    p = decoders.shuffled_label_p(predicted, codes, one, permutations=5999, seed=0)
    assert p == pytest.approx(1 / 6, abs=0.02)
    assert decoders.shuffled_label_p(predicted, codes, codes, permutations=99, seed=0) == 1


def test_a_step_is_told_from_its_first_token_on_and_not_before(routed):
    table = label_onset(routed, draws=200)
    at = table.set_index(["place", "features"])
    assert at.loc[(0, onset.ROUTING), "bits"] < 0.15
    assert at.loc[(1, onset.ROUTING), "ci_low"] > 0.3
    assert at.loc[(1, onset.BOTH), "gain_low"] > 0.3
    assert at.loc[(1, onset.BOTH), "q"] < 0.01
    assert table["steps"].iloc[0] == (routed.steps["step"] > 0).sum()
    found = finding("label_onset", table)
    assert found.verdict is not Verdict.SUPPORTED, "the token before the step knows nothing"
    assert found.effect == at.loc[(0, onset.BOTH), "gain"]


def test_a_label_drawn_at_random_is_told_at_no_token(tmp_path):
    table = label_onset(run_of(tmp_path / "run", 50, seed=3, n_steps=(3, 4), effects=Effects(step=0.5)), draws=100)
    assert (table["gain_low"].dropna() < 0.03).all()
    assert finding("label_onset", table).verdict is not Verdict.SUPPORTED


def test_text_so_far_ends_where_routing_is_read(routed):
    world = onset._world(routed, 10_000, 0)
    step = int(np.argmax(world.length > 5))
    owner, rows = onset._so_far(world, world.start + np.minimum(3, world.length) - 1)
    mine = world.sample.token_id[rows[owner == step]]
    span = routed.steps.set_index(["sequence", "step"])
    first = world.sample.sequence[world.start[step]], world.sample.step[world.start[step]]
    text = span.loc[first, "text"].split()
    assert [f"w{token}" for token in mine] == text[:3]
    before, earlier = onset._step_before(world)
    text = span.loc[(first[0], first[1] - 1), "text"].split()
    assert [f"w{token}" for token in world.sample.token_id[earlier[before == step]]] == text


def test_planted_experts_are_those_that_carry_the_labels(routed):
    table = label_carriers(routed, draws=200)
    experts = table[table["kind"] == EXPERT]
    planted = {(plant.layer, plant.expert): plant.label for plant in PLANTS}
    first = experts.nsmallest(8, "rank")
    cells = list(zip(first["layer"], first["expert"], strict=True))
    assert set(cells) <= set(planted)
    assert np.mean([planted[cell] == label for cell, label in zip(cells, first["label"], strict=True)]) >= 0.75
    assert (first["q"] < 0.05).all()
    chosen, random = (table[table["kind"] == kind].iloc[0] for kind in (CHOSEN, RANDOM))
    assert chosen["more"] == pytest.approx(chosen["lost"] - random["lost"])
    assert chosen["more_low"] > 0.2
    assert chosen["gain_low"] > 0.2
    assert (table.loc[table["kind"] == LAYER, "alone_low"] > 0.2).all()
    found = finding("label_carriers", table)
    assert (found.verdict, found.rung) == (Verdict.SUPPORTED, 4)


def test_what_a_step_loses_by_hand(routed):
    world = carriers._world(routed, 10_000, 0)
    losses = carriers._Losses.of(world)
    assert (losses.each_without(1)[:, 3]) == pytest.approx(losses.without(np.array([16 + 3])))
    row = int(np.flatnonzero(world.measured)[0])
    logits = losses.logits[row] - world.shares[row, 19] * losses.weights[-1][19]
    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    whole = np.exp(losses.logits[row]) / np.exp(losses.logits[row]).sum()
    guess, code = losses.fallback[row], world.codes[row]
    bits = [-np.log2(0.01 * guess[code] + 0.99 * each[code]) for each in (share, whole)]
    assert losses.without(np.array([19]))[row] == pytest.approx(bits[0] - bits[1])


def test_halves_share_no_problem_and_what_nothing_carries_is_not_found(tmp_path):
    run = run_of(tmp_path / "run", seed=4)
    world = carriers._world(run, 10_000, 0)
    unit = run.steps["sequence"].to_numpy()
    assert not set(unit[world.measured]) & set(unit[~world.measured])
    table = label_carriers(run, draws=100)
    assert (table["q"].dropna() > 0.05).all()
    assert finding("label_carriers", table).verdict is not Verdict.SUPPORTED


def test_runs_without_enough_to_tell_are_refused(make_run):
    with pytest.raises(UsageError, match="8 problems with steps in this run; learning on half of them, in folds, needs 10"):
        label_carriers(make_run(8))
    with pytest.raises(UsageError, match="one step label only in this run"):
        label_carriers(make_run(12, labels={"talk": ("plan",)}))
    with pytest.raises(UsageError, match="1 labels of steps that follow another step"):
        label_onset(make_run(12, labels={"talk": ("plan",)}))
    for function in (label_carriers, label_onset):
        with pytest.raises(UsageError, match="no step labels in this run"):
            function(make_run(8, n_steps=(0, 0)))


def test_many_experts_are_reduced_to_components(tmp_path):
    spec = synthetic_spec(n_experts=64, n_groups=4)
    run = synthetic_run(tmp_path / "run", 60, spec=spec, labels=TALK, planted=PLANTS)
    table = label_carriers(run, draws=20)
    top = table[table["kind"] == EXPERT].nsmallest(4, "rank")
    assert set(zip(top["layer"], top["expert"], strict=True)) <= {(plant.layer, plant.expert) for plant in PLANTS}
