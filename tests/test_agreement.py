"""How far runs choose alike, token by token."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pairs import common, plain_traces, rerouted, write_run
from synthetic import Effects, synthetic_spec

from ling_probe import metrics, routing
from ling_probe.analysis import ANALYSES, Verdict, route_agreement, router_saturation, script_main
from ling_probe.analysis.agreement import same_token_elsewhere
from ling_probe.analysis.margins import choice_margin


def runs_of(tmp_path, *lists, names=None, parts=2):
    return [
        write_run(tmp_path / f"run-{place}", traces, parts=parts, name=names[place] if names else "synthetic")
        for place, traces in enumerate(lists)
    ]


def test_agreement_is_what_counting_sets_gives(tmp_path):
    traces = plain_traces(15)
    moved = rerouted(traces, share=0.4)
    table = route_agreement(runs_of(tmp_path, traces, moved))
    slow = common(traces, moved)
    assert table["agreement"].to_numpy() == pytest.approx(slow.mean(axis=0) / 4)
    assert table["decisions_differ"].to_numpy() == pytest.approx((slow < 4).mean(axis=0))
    assert table["differ_so_far"].iloc[-1] == pytest.approx((slow < 4).any(axis=1).mean())
    assert table["tokens"].tolist() == [len(slow)] * 3
    assert table["sequences"].tolist() == [15] * 3
    assert ((table["ci_low"] < table["agreement"]) & (table["agreement"] < table["ci_high"])).all()
    assert set(table["against"]) == {"run-1"}


def test_chance_is_what_strangers_agree_by(tmp_path):
    """Two routers that ignore the token and each other agree as their loads say, groups or not."""
    traces = plain_traces(150)
    table = route_agreement(runs_of(tmp_path, traces, rerouted(traces)))
    assert table["agreement"].to_numpy() == pytest.approx(table["chance"].to_numpy(), abs=0.01)
    assert table["chance"].between(0.249, 0.26).all()
    covered = (table["beyond_low"] <= 0) & (table["beyond_high"] >= 0)
    assert covered.sum() >= 2
    finding = ANALYSES["route_agreement"].finding(table)
    assert finding.verdict is Verdict.NOT_SUPPORTED


def test_even_loads_agree_by_k_of_e(tmp_path):
    """Closed form: 8 of 256 by chance share 8 / 256 of the choice."""
    spec = synthetic_spec(n_experts=256, top_k=8, n_groups=1, topk_groups=1, routed_layers=(1,), vocab_size=8)
    traces = rerouted(plain_traces(60, spec=spec), seed=7)
    table = route_agreement(runs_of(tmp_path, traces, rerouted(traces, seed=8)))
    assert table["chance"].item() == pytest.approx(8 / 256, rel=0.03)
    assert table["agreement"].item() == pytest.approx(8 / 256, rel=0.1)


def test_routers_that_only_read_the_token_agree_no_more_than_the_token_does(tmp_path):
    traces = plain_traces(120)
    table = route_agreement(runs_of(tmp_path, *(rerouted(traces, seed=seed, by_token=2.0) for seed in (5, 6))))
    assert (table["agreement"] > table["chance"] + 0.2).all()
    assert table["beyond_token"].abs().max() < 0.015
    assert (table["token_agreement"] > table["chance"] + 0.2).all()


def test_context_shared_beyond_the_token_is_found(tmp_path):
    traces = plain_traces(40, effects=Effects(token=1.0, sequence=1.0))
    table = route_agreement(runs_of(tmp_path, traces, rerouted(traces, share=0.5)))
    assert (table["beyond_low"] > 0.05).all()


def test_the_verdict_asks_for_99_percent(tmp_path):
    traces = plain_traces(40)
    finding = ANALYSES["route_agreement"].finding
    close = finding(route_agreement(runs_of(tmp_path / "close", traces, rerouted(traces, share=0.001))))
    assert close.verdict is Verdict.SUPPORTED
    far = finding(route_agreement(runs_of(tmp_path / "far", traces, rerouted(traces, share=0.1))))
    assert far.verdict is Verdict.NOT_SUPPORTED
    assert far.ci_low < far.effect < far.ci_high < 0.99
    assert "40 shared sequences" in far.sentence


def test_the_same_token_elsewhere_is_of_another_sequence():
    rng = np.random.default_rng(0)
    token_id, sequence = rng.integers(0, 30, 500), np.sort(rng.integers(0, 20, 500))
    partner = same_token_elsewhere(token_id, sequence, rng)
    found = partner >= 0
    assert found.mean() > 0.8
    assert (token_id[partner[found]] == token_id[found]).all()
    assert (sequence[partner[found]] != sequence[found]).all()
    alone = same_token_elsewhere(np.arange(5), np.arange(5), rng)
    assert alone.tolist() == [-1] * 5


def test_tables_repeat_and_parts_do_not_matter_to_what_is_counted(tmp_path):
    traces = plain_traces(12)
    one = runs_of(tmp_path / "one", traces, rerouted(traces, share=0.3), parts=1)
    many = runs_of(tmp_path / "many", traces, rerouted(traces, share=0.3), parts=4)
    first, again, split = route_agreement(one), route_agreement(one), route_agreement(many)
    assert first.equals(again)
    assert first[["agreement", "ci_low", "chance", "differ_so_far"]].equals(
        split[["agreement", "ci_low", "chance", "differ_so_far"]]
    )


def test_where_the_choice_was_close_it_flips(tmp_path):
    """A little noise on the logits changes the choices of small margin alone."""
    traces = plain_traces(60, keep=("logits",))
    spec, rng = traces[0].spec, np.random.default_rng(1)
    bias = np.zeros((spec.n_rows, spec.n_experts))

    def by_rule(noise):
        found = []
        for trace in traces:
            new = routing.route(trace.extras["logits"] + rng.normal(0, noise, trace.extras["logits"].shape), bias, spec)
            found.append(replace(trace, expert_ids=new.ids, weights=new.weights.astype(np.float32)))
        return found

    table = route_agreement(runs_of(tmp_path, by_rule(0.0), by_rule(0.01)))
    whole, close = table[table["margin"] == "all"], table[table["margin"] != "all"]
    for layer, rows in close.groupby("layer"):
        mine = whole[whole["layer"] == layer].iloc[0]
        assert rows["tokens"].sum() == mine["tokens"]
        assert np.average(rows["agreement"], weights=rows["tokens"]) == pytest.approx(mine["agreement"])
        assert rows["decisions_differ"].iloc[0] > 0.2
        assert rows[rows["margin_low"] >= 0.03]["decisions_differ"].max() == 0
        assert rows["margin_low"].is_monotonic_increasing


def test_a_margin_is_the_least_gap_to_another_choice():
    spec = synthetic_spec(n_experts=6, n_groups=3, topk_groups=2, top_k=2)
    logits = np.log(np.array([[0.9, 0.5, 0.8, 0.3, 0.2, 0.1]]) / (1 - np.array([[0.9, 0.5, 0.8, 0.3, 0.2, 0.1]])))
    # Groups score 1.4, 1.1 and 0.3: the third is 0.8 off. Inside, 0.9 and 0.8 are chosen, 0.5 is 0.3 off.
    assert choice_margin(logits, np.zeros(6), spec) == pytest.approx([0.3])
    assert choice_margin(logits, np.array([0, 0, 0, 0, 0.4, 0.38]), spec) == pytest.approx([0.02]), "the groups come close"
    alone = synthetic_spec(n_experts=4, n_groups=1, topk_groups=1, top_k=4)
    assert np.isinf(choice_margin(logits[:, :4], np.zeros(4), alone))


def test_overlap_ignores_slots():
    rng = np.random.default_rng(0)
    one, other = (np.stack([rng.permutation(40)[:8] for _ in range(70_000)]).reshape(-1, 7, 8).astype(np.uint8) for _ in "ab")
    slow = (one[:50, :, :, None] == other[:50, :, None, :]).sum(axis=(2, 3))
    assert metrics.overlap(one, other)[:50].tolist() == slow.tolist()
    assert (metrics.overlap(one, one[..., ::-1]) == 8).all()


def test_saturation_rises_with_training_and_knows_its_steps(tmp_path):
    final = plain_traces(40)
    shares = {"model@step-300": 0.2, "model@step-20": 0.9, "model@step-100": 0.5}
    checkpoints = [rerouted(final, share=share) for share in shares.values()]
    runs = runs_of(tmp_path, final, *checkpoints, names=["model", *shares])
    table = router_saturation(runs)
    assert table["step"].tolist() == [20] * 3 + [100] * 3 + [300] * 3
    mean = table.groupby("step")["agreement"].mean()
    assert mean.is_monotonic_increasing
    for name, moved in zip(shares, checkpoints, strict=True):
        rows = table[table["checkpoint"] == name]
        assert rows["agreement"].to_numpy() == pytest.approx(common(final, moved).mean(axis=0) / 4)
        above = (rows["agreement"] - rows["chance"]) / (1 - rows["chance"])
        assert rows["above_chance"].to_numpy() == pytest.approx(above.to_numpy())
        assert above.mean() == pytest.approx(1 - shares[name], abs=0.05)
    finding = ANALYSES["router_saturation"].finding(table)
    assert finding.verdict is Verdict.NOT_SUPPORTED
    assert finding.sentence.index("model@step-20 ") < finding.sentence.index("model@step-300 ")


def test_a_checkpoint_that_knows_nothing_is_at_chance_and_a_settled_one_is_settled(tmp_path):
    final = plain_traces(60)
    runs = runs_of(tmp_path, final, rerouted(final), rerouted(final, share=0.05), names=["m", "m@step-1", "m@step-2"])
    table = router_saturation(runs)
    assert table[table["step"] == 1]["above_chance"].abs().max() < 0.03
    settled = ANALYSES["router_saturation"].finding(router_saturation([runs[0], runs[2]]))
    assert settled.verdict is Verdict.SUPPORTED


def test_the_script_takes_the_runs_to_compare_with(tmp_path, capsys):
    traces = plain_traces(6)
    runs = runs_of(tmp_path, traces, rerouted(traces, share=0.5), rerouted(traces, share=0.1))
    against = [word for run in runs[1:] for word in ("--against", str(run.folder))]
    assert script_main("route_agreement", [str(runs[0].folder), *against, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["against"] for row in rows] == ["run-1"] * 3 + ["run-2"] * 3
    assert script_main("route_agreement", [str(runs[0].folder)]) == 2
    assert capsys.readouterr().err == "a comparison needs two runs; name another one with --against\n"
    with pytest.raises(SystemExit):
        script_main("routing_churn", [str(runs[0].folder), *against])
