import doctest
from itertools import combinations

import numpy as np
import pytest
from synthetic import Effects, synthetic_run, synthetic_spec

from ling_probe.analysis import finding, overlap, token_overlap
from ling_probe.analysis.overlap import DIFFERENT, PAIRS, SAME, SAME_BIGRAM, SAME_ELSEWHERE, draw_sets, independent_jaccard
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import sample_tokens
from ling_probe.errors import UsageError


@pytest.fixture(scope="module")
def following(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("overlap") / "run", 80, effects=Effects(token=1.5))


def test_doctests_hold():
    assert doctest.testmod(overlap).failed == 0


def test_the_even_law_by_going_through_all_sets():
    sets = [set(each) for each in combinations(range(7), 3)]
    expected = np.mean([len(one & other) / len(one | other) for one in sets for other in sets])
    assert overlap.uniform_jaccard(7, 3) == pytest.approx(expected)


def test_sets_keep_their_size_and_every_probability():
    inclusion = np.array([1.0, 0.9, 0.6, 0.3, 0.15, 0.05])
    sets = draw_sets(inclusion, 20_000, np.random.default_rng(0))
    assert (sets.sum(axis=1) == 3).all()
    assert sets.mean(axis=0) == pytest.approx(inclusion, abs=0.015)


def test_even_loads_give_the_hypergeometric_law():
    found = independent_jaccard(np.full(32, 4 / 32), np.random.default_rng(1), sets=20_000)
    assert found == pytest.approx(overlap.uniform_jaccard(32, 4), abs=0.002)


def test_partners_share_what_they_should_and_no_sequence(following):
    sample, rng = sample_tokens(following), np.random.default_rng(0)
    bundle, anchors = overlap._bundle(sample, 0), np.arange(0, sample.n_tokens, 3)
    partners = overlap._partners(sample, bundle, anchors, rng)
    assert set(partners) == set(PAIRS)
    for name, partner in partners.items():
        a, b = anchors[partner >= 0], partner[partner >= 0]
        assert len(a) > 20
        assert (sample.sequence[a] != sample.sequence[b]).all()
        assert (bundle[a] == bundle[b]).all()
        same, same_before = sample.token_id[a] == sample.token_id[b], sample.previous_id[a] == sample.previous_id[b]
        assert (~same if name == DIFFERENT else same).all()
        assert {SAME_BIGRAM: same_before.all(), SAME_ELSEWHERE: not same_before.any()}.get(name, True)
    alike = overlap._jaccard(sample, 1, anchors, partners[SAME])
    for place in np.flatnonzero(partners[SAME] >= 0)[:50]:
        one, other = (set(sample.expert_ids[row, 1]) for row in (anchors[place], partners[SAME][place]))
        assert alike[place] == pytest.approx(len(one & other) / len(one | other))


def test_the_same_token_is_routed_alike_where_routing_follows_it(following):
    table = token_overlap(following)
    same, different = (table[table["pair"] == name].set_index("layer") for name in (SAME, DIFFERENT))
    assert (same["difference_low"] > 0.1).all()
    assert (different["jaccard"] - different["chance"]).abs().max() < 0.04
    assert (different["difference"] == 0).all()
    assert finding("token_overlap", table).verdict is Verdict.SUPPORTED


def test_no_difference_is_found_where_there_is_none(tmp_path):
    outside = 0
    for seed in range(15):
        run = synthetic_run(tmp_path / str(seed), 60, seed=seed, effects=Effects(sequence=0.5))
        rows = token_overlap(run, draws=300).query("pair == @SAME")
        outside += ((rows["difference_low"] > 0) | (rows["difference_high"] < 0)).sum()
    assert outside <= 7, "45 intervals of 95 %"


def test_few_sequences_have_no_interval_and_no_shared_token_is_refused(make_run):
    table = token_overlap(make_run(6))
    assert table["ci_low"].isna().all()
    assert finding("token_overlap", table).verdict is Verdict.CANNOT_TELL
    with pytest.raises(UsageError, match="no token id occurs in two sequences"):
        token_overlap(make_run(2, spec=synthetic_spec(vocab_size=100_000)))
