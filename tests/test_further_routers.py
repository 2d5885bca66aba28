"""Conditions that claims rest on: no groups, single ranks left out, the busiest experts barred; and what is kept of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_rerouting import RECORDS, K, by_hand, loaded, row, seen, state  # noqa: F401

from ling_probe.benchmarks import Benchmark
from ling_probe.causal import check_model, keep_rerouting
from ling_probe.claims import ClaimVerdict, claims
from ling_probe.errors import UsageError
from ling_probe.recording import record
from ling_probe.rerouting import FURTHER, OTHER_DRAWS, rerouted_losses
from ling_probe.run.folder import REROUTED

NAMES = [
    "true", "no-groups", *(f"without rank {rank}" for rank in range(1, K + 1)), "without busiest",
    *(f"without others {draw}" for draw in range(1, OTHER_DRAWS + 1)),
]  # fmt: skip


def test_every_condition_changes_what_it_says(loaded, seen):  # noqa: F811
    before = state(loaded)
    table = rerouted_losses(loaded, RECORDS, kinds=FURTHER)
    assert list(table["condition"].unique()) == NAMES
    assert state(loaded) == before
    chosen = {(name, seen[2 * i + m][0]): seen[2 * i + m][1] for i, name in enumerate(NAMES) for m in (0, 1)}
    groups = {name: torch.nn.functional.one_hot(chosen[name, 1] // 4, 4).any(1).sum(1).max() for name in NAMES}
    assert {name for name, most in groups.items() if most > 2} == {"no-groups"}
    barred = {name: set(range(16)) - set(chosen[name, 1].flatten().tolist()) for name in NAMES}
    load = np.bincount(real_ids(loaded, chosen["true", 1]), minlength=16)
    busiest = set(np.argsort(-load, kind="stable")[:K].tolist())
    assert barred["without busiest"] >= busiest
    for draw in range(1, OTHER_DRAWS + 1):
        assert len(barred[f"without others {draw}"]) >= K
        assert not busiest <= barred[f"without others {draw}"]
    assert torch.equal(chosen["without rank 1", 1], chosen["true", 1])
    assert table["loss"].nunique() == len(table)


def real_ids(loaded, ids):  # noqa: F811
    """Choices without those of padding, as batches of similar length have it: the same records, unpadded, one by one."""
    found = []
    gate = loaded.gates()[1]
    handle = gate.register_forward_hook(lambda _g, _a, out: found.append(out[2].flatten()))
    for each in RECORDS:
        by_hand(loaded, each)
    handle.remove()
    assert sum(map(len, found)) <= ids.numel()
    return torch.cat(found).numpy()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_left_out_has_no_weight_and_the_others_keep_theirs(loaded, rank):  # noqa: F811
    table = rerouted_losses(loaded, RECORDS, kinds=("without",))

    def silence(_gate, _inputs, out):
        slot = out[1].argsort(dim=1, descending=True)[:, rank - 1]
        return out[0], out[1] * (torch.arange(K) != slot[:, None]), out[2]

    handles = [gate.register_forward_hook(silence) for gate in loaded.gates().values()]
    losses = torch.cat([by_hand(loaded, each)[0] for each in RECORDS])
    for handle in handles:
        handle.remove()
    assert row(table, f"without rank {rank}")["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_what_is_kept_is_read_by_the_claims(loaded, tmp_path):  # noqa: F811
    run = record(loaded, Benchmark("sums", "test", tuple(RECORDS), "0" * 64), tmp_path / "run")
    before = (run.folder / "run.json").read_bytes()
    told = []
    table = keep_rerouting(run, loaded, RECORDS, progress=lambda done, total: told.append((done, total)))
    pd.testing.assert_frame_equal(pd.read_parquet(run.folder / REROUTED), table)
    assert [path.name for path in (run.folder / REROUTED).parent.iterdir()] == [REROUTED.name]
    assert (run.folder / "run.json").read_bytes() == before
    assert told == [(n, len(told) + 1) for n in range(1, len(told) + 1)]
    found = {claim.key: claim.parts[0] for claim in claims(run, {})}
    for key in ("groups_cost_nothing", "bias_for_balance", "every_activation"):
        assert found[key].verdict is not ClaimVerdict.NOT_TESTED, key
        assert found[key].n == len(RECORDS)


def test_another_model_than_the_runs_is_refused(loaded, make_run):  # noqa: F811
    with pytest.raises(UsageError, match="random has other weights than the model of"):
        check_model(make_run(3), loaded)
