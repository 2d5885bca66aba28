import numpy as np
import pytest
from synthetic import Effects, Planted, synthetic_run

from ling_probe import stats
from ling_probe.analysis import enrichment, finding, surest_first
from ling_probe.analysis.question import Verdict
from ling_probe.analysis.sample import sample_tokens, two_halves
from ling_probe.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enrichment") / "run"
    return synthetic_run(folder, 100, effects=Effects(token=1.5), planted=Planted(2, 5, "multiply", 4.0))


@pytest.fixture(scope="module")
def table(run):
    return enrichment(run, least=10)


def test_counts_are_those_of_the_held_out_half(run, table):
    sample = sample_tokens(run)
    held = ~two_halves(sample.sequence)
    for row in surest_first(table.query("kind == 'token'")).head(5).to_dict("records"):
        place, named = row["layer"] - 1, sample.token_id == int(row["name"].removeprefix(" w"))
        chose = (sample.expert_ids[:, place] == row["expert"]).any(axis=1)
        assert row["count"] == (held & named & chose).sum()
        assert row["expected"] == pytest.approx((held & named).sum() * (held & chose).sum() / held.sum())
        assert row["pmi"] == pytest.approx(np.log2((row["count"] + 0.5) / (row["expected"] + 0.5)))
        joint = row["count"] / (held.sum() * 4)
        assert row["npmi"] == pytest.approx(row["pmi"] / -np.log2(joint))


def test_every_expert_has_its_first_names(table):
    assert (table.groupby(["layer", "expert", "kind"]).size() == 5).all()
    assert len(table) == 3 * 16 * 2 * 5
    assert table.loc[table["expected"] < 5, "p"].isna().all()


def test_what_routing_follows_is_found(table):
    found = finding("enrichment", table)
    assert found.verdict is Verdict.SUPPORTED
    assert found.ci_low > 1
    assert "held" in found.sentence or "hold on the other" in found.sentence
    labels = surest_first(table.query("kind == 'label'"))
    assert labels[["layer", "expert", "name"]].iloc[0].tolist() == [2, 5, "multiply"]


def test_the_best_of_noise_is_high_where_it_is_found_and_nothing_elsewhere(tmp_path):
    found, held, discoveries = [], [], 0
    for seed in range(8):
        run = synthetic_run(tmp_path / str(seed), 60, seed=seed, effects=Effects(sequence=0.5))
        table = enrichment(run, least=8, top=1).query("kind == 'token'")
        found.append(table["pmi_found"].mean())
        held.append(np.log2(table["count"].sum() / table["expected"].sum()))
        assert table["best_of_noise"].mean() == pytest.approx(table["pmi_found"].mean(), abs=0.15)
        discoveries += (table["q"] < 0.05).sum()
    assert np.mean(found) > 0.7
    assert abs(np.mean(held)) < 0.1
    assert discoveries <= 4, "8 runs of 48 rows"


def test_too_rare_names_are_refused(run):
    with pytest.raises(UsageError, match="no token id is seen 10000 times in each half"):
        enrichment(run, least=10_000)


def test_few_sequences_have_no_p(make_run):
    table = enrichment(make_run(6, step_tokens=(60, 90)))
    assert table["p"].isna().all()
    assert finding("enrichment", table).verdict is Verdict.CANNOT_TELL


def test_labels_are_corrected_by_themselves(tmp_path):
    """Routing follows the token and no label: however many tokens are found, no more labels are than chance allows."""
    run = synthetic_run(tmp_path / "run", 200, effects=Effects(token=2.0))
    table = enrichment(run)
    found = table[table["q"] < 0.05].groupby("kind").size()
    assert found["token"] > 100
    assert found.get("label", 0) <= 1
    for kind in ("token", "label"):
        rows = table[table["kind"] == kind]
        assert rows["q"].to_numpy() == pytest.approx(stats.benjamini_hochberg(rows["p"].to_numpy()), nan_ok=True)
