import doctest

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic import Effects, Planted, synthetic_run, synthetic_spec, synthetic_traces

from ling_probe.analysis import finding, information, routing_information
from ling_probe.analysis import sample as samples
from ling_probe.analysis.deviations import deviations, half_weights
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import label_codes, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

TALK = {"talk": ("plan", "check", "conclude", "recall")}
PLANTS = tuple(Planted(layer, expert, label, 3.0) for layer in (1, 2, 3) for expert, label in enumerate(TALK["talk"]))


def means(table, about="label"):
    rows = table[table["layer"].isna() & (table["about"] == about)]
    return rows.set_index("given")


def mean_of(folder, n=80, **options):
    return means(routing_information(synthetic_run(folder, n, labels=TALK, **options), permutations=99, draws=300))


def test_doctests_hold():
    assert doctest.testmod(samples).failed == 0


def test_deviations_are_those_of_counting_one_by_one(make_run):
    sample = sample_tokens(make_run(8, effects=Effects(token=1.0)))
    classes, owner = samples.numbered(sample.token_id), sample.position % 3 - 1
    chose = np.zeros((sample.n_tokens, 16))
    np.put_along_axis(chose, sample.expert_ids[:, 2].astype(int), 1, axis=1)
    expected = np.zeros((2, 16))
    for token in range(sample.n_tokens):
        if owner[token] >= 0:
            expected[owner[token]] += chose[token] - chose[classes == classes[token]].mean(axis=0)
    rate = chose.mean(axis=0)
    assert deviations(sample, 2, classes, owner, 2) == pytest.approx(expected / np.sqrt(2 * np.log(2) * rate * (1 - rate)))


def test_a_label_that_follows_the_words_is_known_until_they_are_given(tmp_path):
    """Raw information is large, and nothing of it is left: confounds first."""
    run = synthetic_run(tmp_path / "run", 80, labels=TALK, effects=Effects(token=1.5, confounded=True))
    table = routing_information(run, permutations=99)
    told = means(table)
    assert told.loc["nothing", "bits"] > 0.15
    assert told.loc["nothing", "p"] == 0.01
    for given in ("token", "token and position", "token and the one before"):
        assert abs(told.loc[given, "bits"]) < 0.01
        assert told.loc[given, "compared"] < 0.01
    assert finding("routing_information", table).verdict is Verdict.CANNOT_TELL, "words and labels cannot be told apart"


def test_a_label_that_routing_follows_is_known_whatever_is_given(tmp_path):
    run = synthetic_run(tmp_path / "run", 100, labels=TALK, planted=PLANTS, effects=Effects(token=0.7))
    table = routing_information(run, permutations=99)
    told = means(table)
    assert (told.loc[["nothing", "token"], "ci_low"] > 0.1).all()
    assert (told["p"] == 0.01).all()
    found = finding("routing_information", table)
    assert found.verdict is Verdict.SUPPORTED
    assert found.rung == 2
    assert found.effect == told.loc["token and position", "bits"]
    layers = table[(table["about"] == "label") & (table["given"] == "token")]
    assert layers["layer"].tolist()[:3] == [1, 2, 3]
    assert layers["bits"].iloc[:3].mean() == pytest.approx(layers["bits"].iloc[3])


def test_small_amounts_are_the_mutual_information(tmp_path):
    """Against the plug-in sum over experts on a run large enough for its bias not to matter."""
    weak = tuple(Planted(each.layer, each.expert, each.label, 0.8) for each in PLANTS)
    run = synthetic_run(tmp_path / "run", 500, labels=TALK, planted=weak)
    told = routing_information(run, permutations=19).query("about == 'label' and given == 'nothing' and layer == 2")
    sample = sample_tokens(run)
    sample = sample.only(sample.step >= 0)
    label = label_codes(run, sample)
    exact = sum(binary_information(label, (sample.expert_ids[:, 1] == expert).any(axis=1)) for expert in range(16))
    assert told["bits"].item() == pytest.approx(exact, rel=0.2)


def binary_information(label, chose) -> float:
    joint = np.array([[(chosen & (label == each)).mean() for each in range(4)] for chosen in (chose, ~chose)])
    return float((joint * np.log2(joint / np.outer(joint.sum(axis=1), joint.sum(axis=0)))).sum())


def test_tokens_of_a_step_that_route_alike_leave_no_bias(tmp_path):
    """Plug-in information is too high, and Miller and Madow's correction, made for independent tokens, takes too little."""
    plug_in, corrected, halves = [], [], []
    for seed in range(12):
        run = synthetic_run(tmp_path / str(seed), 60, seed=seed, labels=TALK, effects=Effects(step=1.0))
        halves.append(means(routing_information(run, permutations=1, draws=10))["bits"].to_numpy())
        sample = sample_tokens(run)
        sample = sample.only(sample.step >= 0)
        label = label_codes(run, sample)
        layer = [sum(binary_information(label, (ids == expert).any(axis=1)) for expert in range(16)) for ids in
                 (sample.expert_ids[:, place] for place in range(3))]  # fmt: skip
        plug_in.append(np.mean(layer))
        corrected.append(np.mean(layer) - 16 * 3 / (2 * np.log(2) * sample.n_tokens))
    assert scipy_stats.ttest_1samp(plug_in, 0).statistic > 8
    assert scipy_stats.ttest_1samp(corrected, 0).statistic > 8
    assert (np.abs(scipy_stats.ttest_1samp(halves, 0).statistic) < 3).all(), "whatever is given"


def test_p_is_even_without_an_effect(tmp_path):
    found = []
    for seed in range(30):
        told = mean_of(tmp_path / str(seed), 30, seed=seed, effects=Effects(token=1.0, step=0.7, sequence=0.5))
        found.append(told.loc[["nothing", "token"], "p"].to_numpy())
    for p in np.transpose(found):
        assert scipy_stats.kstest(p, "uniform").pvalue > 0.01
        assert (p <= 0.05).sum() <= 5


def test_tokens_sequences_and_families_are_told(tmp_path):
    families = tuple(Planted(layer, 3, "causal", 3.0) for layer in (1, 2, 3))
    run = synthetic_run(tmp_path / "run", 120, planted=families, effects=Effects(token=1.5, sequence=0.7))
    table = routing_information(run, permutations=99)
    assert means(table, "token")["ci_low"].item() > 1
    assert means(table, "sequence")["ci_low"].item() > 0.1
    assert abs(means(table, "previous token")["bits"].item()) < 0.1
    assert means(table, "position")["ci_high"].item() < 0.1
    assert means(table, "family").loc["token", "ci_low"] > 0
    assert means(table, "family").loc["token", "p"] == 0.01
    assert means(table, "correct").loc["token", "ci_low"] < 0.02


def test_without_labels_families_or_errors_there_is_nothing_to_tell(tmp_path):
    traces = synthetic_traces(synthetic_spec(), 6, rng=np.random.default_rng(0), labels={"talk": ("plan",)})
    run = Run.create(tmp_path / "run", spec=traces[0].spec, model={}, benchmark={}, options={})
    run.append([trace for trace in traces if trace.correct])
    with pytest.raises(UsageError, match="no step labels, no second family and no mix of right and wrong"):
        routing_information(run)


def test_weights_of_halves_by_hand():
    group, half = np.array([0, 0, 1, 1, 2]), np.array([True, False, True, False, True])
    weights = half_weights(group, np.array([2.0, 6.0, 1.0, 1.0, 5.0]), half, 3)
    share = np.sqrt(np.array([8, 2, 0]) / 15)
    np.testing.assert_allclose(weights, [share / [2, 1, 5], share / [6, 1, 1]])


def test_a_run_in_which_words_say_all_and_labels_nothing_is_not_supported(make_run):
    table = routing_information(make_run(300, labels=TALK, effects=Effects(token=1.5)), permutations=99)
    found = finding("routing_information", table)
    assert found.verdict is Verdict.NOT_SUPPORTED
    assert found.ci_low < 0 < found.ci_high < 0.01


def test_few_sequences_cannot_tell(make_run):
    table = routing_information(make_run(12), permutations=19)
    assert table["ci_low"].isna().sum() >= 64 - 8
    found = finding("routing_information", table)
    assert found.verdict is Verdict.CANNOT_TELL
    assert "too few sequences for an interval" in found.sentence


def test_labels_are_shuffled_inside_their_problem_and_correctness_inside_its_family(make_run):
    run = make_run(30)
    world = information._world(sample_tokens(run), 0)
    labellings = {each.about: each for each, _ in information._labellings(run, world, 20, 0)}
    assert set(labellings) == {"label", "family", "correct"}
    family = samples.numbered(run.sequences["family"].to_numpy(dtype=str))
    assert labellings["family"].codes[0].tolist() == family.tolist()
    assert labellings["label"].centre.tolist() == run.steps["sequence"].tolist()
    for about, block in (("label", run.steps["sequence"].to_numpy()), ("correct", family)):
        codes = labellings[about].codes
        assert (codes[1:] != codes[0]).any()
        for each in np.unique(block):
            assert (np.sort(codes[:, block == each], axis=1) == np.sort(codes[0, block == each])).all()
