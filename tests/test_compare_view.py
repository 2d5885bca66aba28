import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from synthetic import synthetic_run, synthetic_spec

from ling_probe import stats
from ling_probe.compare_view import answers_side_by_side, is_checkpoint, shared_problems, token_overlap_table
from ling_probe.errors import UsageError
from ling_probe.run import Run
from ling_probe.token_view import token_table


@pytest.fixture
def pair(make_run):
    """Two runs of the same texts with other routing, and so other answers."""
    return make_run(24, seed=1), make_run(24, seed=2)


def test_answers_of_two_runs_are_counted_problem_by_problem(pair):
    table = answers_side_by_side(*pair)
    assert table["family"].tolist() == ["all", "arithmetic", "deduction", "causal"]
    here, there = (run.sequences["correct"].astype(bool).to_numpy() for run in pair)
    whole = table.iloc[0]
    assert whole["shared"] == 24
    assert whole["share_here"] == here.mean()
    assert (whole["low_there"], whole["high_there"]) == stats.wilson_interval(int(there.sum()), 24)
    alone = int((here & ~there).sum()), int((~here & there).sum())
    assert (whole["only_here"], whole["only_there"]) == alone
    assert whole["p"] == binomtest(alone[0], sum(alone)).pvalue
    assert table["judged_here"].iloc[1:].sum() == 24


def test_runs_of_other_problems_share_none_and_have_no_p(make_run):
    table = answers_side_by_side(make_run(4), make_run(6, labels={"z": ("add", "take")}))
    assert table["shared"].eq(0).all()
    assert table["p"].isna().all()
    assert np.isnan(table.set_index("family").loc["z", "share_here"])


def test_shared_problems_keep_the_order_of_the_first():
    one, two = (pd.DataFrame({"sequence_id": list(ids)}) for ids in ("dcba", "abx"))
    assert shared_problems(one, two) == ["b", "a"]


def test_tokens_of_two_runs_are_compared_expert_by_expert(tmp_path):
    first = synthetic_run(tmp_path / "one", 3)
    same = token_overlap_table([first, first], [1, 1], layer=2)
    assert same["common"].eq(4).all()
    assert same["shade"].eq(0).all()
    other = rerouted(first, tmp_path / "two")
    table = token_overlap_table([first, other], [1, 1], layer=2)
    here, there = (token_table(run, 1, layer=2) for run in (first, other))
    common = [len(set(one) & set(two)) for one, two in zip(here["experts"], there["experts"], strict=True)]
    assert table["common"].tolist() == common
    assert table["shade"].tolist() == [4 - each for each in common]
    assert table["experts_there"].tolist() == there["experts"].tolist()


def rerouted(run, folder) -> Run:
    """The same run with its layers exchanged: the same texts, other choices."""
    import shutil

    import pyarrow.parquet as pq

    shutil.copytree(run.folder, folder)
    for path in folder.glob("parts/*/tokens.parquet"):
        table = pq.read_table(path)
        swapped = {"experts_2": "experts_3", "experts_3": "experts_2", "weights_2": "weights_3", "weights_3": "weights_2"}
        pq.write_table(
            table.rename_columns([swapped.get(name, name) for name in table.column_names]).select(table.column_names), path
        )
    return Run.open(folder)


def test_other_texts_are_refused(pair):
    with pytest.raises(UsageError, match="read other texts in this problem"):
        token_overlap_table(pair, [0, 0], layer=2)


def test_checkpoints_are_earlier_snapshots_of_one_training(tmp_path):
    names = ("m", "m@step-5", "m@step-9", "other@step-5")
    final, early, late, foreign = (
        synthetic_run(tmp_path / str(number), 3, spec=synthetic_spec(name=name)) for number, name in enumerate(names)
    )
    assert is_checkpoint(final, early)
    assert is_checkpoint(late, early)
    assert not is_checkpoint(early, late)
    assert not is_checkpoint(early, final)
    assert not is_checkpoint(foreign, final)
    assert not is_checkpoint(final, synthetic_run(tmp_path / "z", 3, spec=synthetic_spec(name="m@step-5", n_experts=32)))
    assert not is_checkpoint(
        final, synthetic_run(tmp_path / "y", 3, spec=synthetic_spec(name="m@step-5"), labels={"z": ("a",)})
    )
