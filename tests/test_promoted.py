"""What experts raise beyond their company: against a plain search, planted, and by chance alone."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import synthetic_spec, synthetic_traces

from ling_probe.analysis.promoted import promoted_tokens
from ling_probe.analysis.sample import two_halves
from ling_probe.errors import UsageError
from ling_probe.run import Run

SPEC = synthetic_spec(vocab_size=12)


def run_of(folder, n_sequences=40, *, seed=0, planted=None):
    """Attributions drawn at random; `planted` (expert, token id) adds one logit in layer 2 where the id follows."""
    rng = np.random.default_rng(seed)
    run = Run.create(folder, spec=SPEC, model={"name": "m"}, benchmark={"name": "b"}, options={})
    traces = []
    for trace in synthetic_traces(SPEC, n_sequences, rng=rng, keep=("lens",), step_tokens=(20, 30)):
        lens = rng.normal(0.2, 1.0, trace.extras["lens"].shape).astype(np.float16).astype(np.float32)
        if planted:
            expert, code = planted
            following = np.append(trace.token_ids[1:], -1) == code
            lens[:, 1][(trace.expert_ids[:, 1] == expert) & following[:, None]] += 1.0
        traces.append(replace(trace, extras={"lens": lens}))
    for some in (traces[: n_sequences // 2], traces[n_sequences // 2 :]):
        run.append(some)
    run.finish()
    return run


def test_effects_are_those_of_a_plain_search(tmp_path):
    run = run_of(tmp_path / "run")
    table = promoted_tokens(run, 2, top=2)
    held = ~two_halves(np.arange(40))
    own, every = {}, {}
    for batch in run.batches(layers=[2], columns=["lens"]):
        for token in range(len(batch.sequence) - 1):
            same = batch.sequence[token] == batch.sequence[token + 1]
            if not (same and held[batch.sequence[token]] and batch.segment[token + 1] in (1, 2)):
                continue
            code = int(batch.token_id[token + 1])
            for expert, value in zip(batch.expert_ids[token, 0].tolist(), batch.extra["lens"][token, 0], strict=True):
                own.setdefault((expert, code), []).append(value)
                every.setdefault(code, []).append((expert, value))
    for row in table.itertuples():
        mine = own[row.expert, row.code]
        others = [value for expert, value in every[row.code] if expert != row.expert]
        assert row.count == len(mine)
        assert row.mean == pytest.approx(np.mean(mine), rel=1e-4, abs=1e-6)
        assert row.others == pytest.approx(np.mean(others), rel=1e-4, abs=1e-6)
        assert row.beyond == pytest.approx(row.mean - row.others)
        assert row.token == f" w{row.code}"


def test_a_planted_token_is_raised(tmp_path):
    table = promoted_tokens(run_of(tmp_path / "run", planted=(5, 7)), 2)
    first = table[(table["expert"] == 5) & (table["kind"] == "raised")].iloc[0]
    assert first["code"] == 7
    assert first["ci_low"] < 1.0 < first["ci_high"]
    assert first["q"] < 1e-4
    assert (table["q"] < 0.05).mean() < 0.2


def test_chance_rarely_passes(tmp_path):
    calls = [(promoted_tokens(run_of(tmp_path / f"run-{seed}", seed=seed), 2)["q"] < 0.05).any() for seed in range(20)]
    assert np.sum(calls) <= 4


def test_few_problems_have_no_interval(tmp_path):
    table = promoted_tokens(run_of(tmp_path / "run", 12), 2)
    assert table["beyond"].notna().any()
    assert table[["ci_low", "p", "q"]].isna().all().all()


def test_refusals(tmp_path, make_run):
    with pytest.raises(UsageError, match="capture it with --keep lens"):
        promoted_tokens(make_run(4), 2)
    with pytest.raises(UsageError, match="before the same token"):
        promoted_tokens(run_of(tmp_path / "run", 4), 2, least=5000)
    with pytest.raises(UsageError):
        promoted_tokens(run_of(tmp_path / "other", 4), 0)
