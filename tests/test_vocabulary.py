from collections import Counter, defaultdict

import numpy as np
import pytest
from synthetic import Effects, synthetic_run

from ling_probe.analysis import finding, vocabulary_specialisation
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import sample_tokens, two_halves
from ling_probe.errors import UsageError


@pytest.fixture(scope="module")
def following(tmp_path_factory):
    """Routing that follows the token."""
    return synthetic_run(tmp_path_factory.mktemp("vocabulary") / "run", 60, effects=Effects(token=2.0))


def share_by_hand(sample, first, place, ids, least) -> float:
    chosen = [defaultdict(Counter), defaultdict(Counter)]
    seen = [Counter(), Counter()]
    for token in range(sample.n_tokens):
        half = 0 if first[token] else 1
        seen[half][ids[token]] += 1
        chosen[half][ids[token]].update(sample.expert_ids[token, place].tolist())
    words = [word for word in seen[0] if word >= 0 and min(seen[0][word], seen[1][word]) >= least]
    shares = []
    for half in (0, 1):
        for word in words:
            most = max(chosen[half][word].values())
            favourite = min(expert for expert, count in chosen[half][word].items() if count == most)
            shares.append(chosen[1 - half][word][favourite] / seen[1 - half][word])
    return float(np.mean(shares))


def test_shares_are_those_of_counting_one_by_one(following):
    table = vocabulary_specialisation(following, least=6, seed=3)
    sample = sample_tokens(following, seed=3)
    first = two_halves(sample.sequence, seed=3)
    for of, ids in (("input", sample.token_id), ("next", sample.next_id)):
        rows = table[table["of"] == of]
        assert rows["layer"].tolist() == [1, 2, 3]
        expected = [share_by_hand(sample, first, place, ids, 6) for place in range(3)]
        assert rows["share"].tolist() == pytest.approx(expected)
    assert ((table["ci_low"] < table["share"]) & (table["share"] < table["ci_high"])).all()


def test_the_token_is_found_and_the_next_one_is_not(following):
    table = vocabulary_specialisation(following, least=5)
    given, after = (table[table["of"] == of] for of in ("input", "next"))
    assert (given["ci_low"] > given["chance"] + 0.2).all()
    assert (after["share"] < after["chance"] + 0.1).all()
    found = finding("vocabulary_specialisation", table)
    assert found.verdict is Verdict.SUPPORTED
    assert found.effect == pytest.approx((given["share"] - given["chance"]).min())


def test_noise_does_not_read_as_preference(make_run):
    """Few tokens an id: the best of the same tokens is far too high, the held-out share is chance."""
    table = vocabulary_specialisation(make_run(60), least=5)
    assert (table["same_tokens"] > table["chance"] + 0.12).all()
    assert (table["share"] - table["chance"]).abs().mean() < 0.04
    assert finding("vocabulary_specialisation", table).verdict is not Verdict.SUPPORTED


def test_too_rare_ids_are_refused(following):
    with pytest.raises(UsageError, match="no token id is seen 10000 times in each half"):
        vocabulary_specialisation(following, least=10_000)
