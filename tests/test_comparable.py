"""Which runs may be compared, and their tokens side by side."""

from dataclasses import replace

import numpy as np
import pytest
from pairs import plain_traces, relabelled, rerouted, write_run
from synthetic import synthetic_spec

from ling_probe.analysis import ANALYSES, load_shift, route_agreement, router_saturation
from ling_probe.analysis.aligned import aligned_batches, chosen_together
from ling_probe.analysis.comparable import numbering_p, require_shared, run_names, shared_sequences
from ling_probe.errors import UsageError

COMPARISONS = (route_agreement, router_saturation, load_shift)


@pytest.fixture
def first(tmp_path):
    return write_run(tmp_path / "first", plain_traces(8), parts=2)


def refused(match, *runs):
    for comparison in COMPARISONS:
        with pytest.raises(UsageError, match=match) as error:
            comparison(runs)
        assert len(str(error.value).splitlines()) == 1


def test_comparisons_say_that_they_are():
    named = {each.__name__ for each in COMPARISONS} | {"accuracy_difference", "operation_transfer"}
    assert {name for name, each in ANALYSES.items() if each.compares} == named


def test_one_run_and_the_same_run_twice_are_refused(first):
    refused(r"a comparison needs two runs; name another one with --against", first)
    refused(r"is compared with itself; name another run", first, first)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"top_k": 2}, "top-k 4 and .* 2"),
        ({"n_experts": 32}, "experts 16 and .* 32"),
        ({"routed_layers": (2, 3)}, "routed layers 1, 2, 3 and .* 2, 3"),
        ({"n_groups": 1, "topk_groups": 1}, "groups 4 and .* 1"),
        ({"vocab_size": 80}, "vocabulary 64 and .* 80"),
    ],
)
def test_another_geometry_is_refused(first, tmp_path, changes, told):
    other = write_run(tmp_path / "other", plain_traces(8, spec=synthetic_spec(**changes)))
    refused(f"{told}; only runs of one geometry compare", first, other)


def test_another_tokenizer_and_an_empty_run_are_refused(tmp_path, make_run):
    one, two = (write_run(tmp_path / name, plain_traces(3), tokenizer_digest=name) for name in "ab")
    refused("read by other tokenizers", one, two)
    refused("holds no sequences yet", one, make_run(0))


def test_other_texts_under_the_same_id_are_refused_by_token(first, tmp_path):
    traces = plain_traces(8)
    ids = traces[5].token_ids.copy()
    ids[2] += 1 if ids[2] < 63 else -1
    traces[5] = replace(traces[5], token_ids=ids)
    other = write_run(tmp_path / "other", traces, parts=3)
    for comparison in (route_agreement, router_saturation):
        with pytest.raises(UsageError, match=rf"sequence {traces[5].sequence_id} has other tokens in .*other than in .*first"):
            comparison([first, other])
    assert load_shift([first, other])["paired"].all(), "loads of the same problem compare whatever was written"


def test_a_longer_text_is_another_text(tmp_path):
    short, long = plain_traces(4), plain_traces(4, seed=5)
    trace = long[-1] if long[-1].n_tokens > short[-1].n_tokens else short[-1]
    cut = replace(
        trace, sequence_id="x", token_ids=trace.token_ids[:3], tokens=trace.tokens[:3], expert_ids=trace.expert_ids[:3],
        weights=trace.weights[:3], segment=trace.segment[:3], step=trace.step[:3], loss=trace.loss[:3], steps=(),
    )  # fmt: skip
    whole = replace(trace, sequence_id="x")
    for name, (one, two) in {"a": (cut, whole), "b": (whole, cut)}.items():
        runs = [write_run(tmp_path / f"{name}{place}", [each]) for place, each in enumerate((one, two))]
        with pytest.raises(UsageError, match="sequence x has other tokens"):
            route_agreement(runs)


def test_no_shared_sequence_is_refused_by_token(first, tmp_path):
    traces = [replace(trace, sequence_id=f"else-{trace.sequence_id}") for trace in plain_traces(5)]
    other = write_run(tmp_path / "other", traces)
    with pytest.raises(UsageError, match="share none of their 8 and 5 sequences; capture the same problems with both models"):
        route_agreement([first, other])
    table = load_shift([first, other])
    assert not table["paired"].any()
    assert len(shared_sequences(first, other).rows) == 0


def test_models_trained_apart_are_refused_and_relatives_are_not(tmp_path):
    traces = plain_traces(30)
    first = write_run(tmp_path / "first", traces, name="lab/model-a")
    stranger = write_run(tmp_path / "stranger", relabelled(traces), name="lab/model-b")
    refused("lab/model-a and lab/model-b choose as if the experts of one were numbered at random", first, stranger)
    relative = write_run(tmp_path / "relative", rerouted(traces, share=0.8), name="lab/model-c")
    snapshot = write_run(tmp_path / "snapshot", relabelled(traces), name="lab/model-a@step-10")
    for comparison in COMPARISONS:
        assert len(comparison([first, relative]))
        assert len(comparison([first, snapshot])), "a snapshot of the same name is taken at its word"
    other_text = [replace(trace, sequence_id=f"else-{trace.sequence_id}") for trace in traces]
    apart = write_run(tmp_path / "apart", other_text, name="lab/model-d")
    with pytest.raises(UsageError, match="share no text, so nothing tells whether their experts are numbered alike"):
        load_shift([first, apart])


def test_numbering_at_random_is_called_so_at_the_stated_rate():
    rng = np.random.default_rng(0)
    p = [numbering_p(rng.gamma(0.3, size=(2, 12, 12)), relabellings=99, seed=seed) for seed in range(200)]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.1
    assert numbering_p(np.ones((1, 12, 12)) + np.eye(12), relabellings=99) == 0.01


def test_the_same_tokens_stand_side_by_side_whatever_the_parts(tmp_path):
    traces = plain_traces(12)
    moved = rerouted(traces)
    first = write_run(tmp_path / "first", traces, parts=3)
    order = np.random.default_rng(3).permutation(12)[:9]
    second = write_run(tmp_path / "second", [moved[place] for place in order], parts=4)
    shared = require_shared(first, second)
    assert sorted(shared.rows) == sorted(order)
    seen = {}
    for batch in aligned_batches(first, second, shared, layers=[3, 1]):
        for place in np.unique(batch.sequence):
            mine = batch.sequence == place
            seen[int(shared.rows[place])] = (batch.token_id[mine], batch.one[mine], batch.other[mine])
    assert sorted(seen) == sorted(order.tolist())
    for row, (token_id, one, other) in seen.items():
        assert token_id.tolist() == traces[row].token_ids.tolist()
        assert one.tolist() == traces[row].expert_ids[:, [2, 0]].tolist()
        assert other.tolist() == moved[row].expert_ids[:, [2, 0]].tolist()


def test_counts_of_experts_chosen_together(tmp_path):
    traces = plain_traces(3)
    moved = rerouted(traces)
    first, second = (write_run(tmp_path / name, each) for name, each in (("a", traces), ("b", moved)))
    together = chosen_together(first, second, require_shared(first, second), most=20)
    slow = np.zeros((3, 16, 16))
    for one, other in zip(traces[0].expert_ids[:20], moved[0].expert_ids[:20], strict=True):
        for row in range(3):
            slow[row][np.ix_(one[row], other[row])] += 1
    if traces[0].n_tokens >= 20:
        assert together.tolist() == slow.tolist()
    assert together.sum() == 20 * 3 * 16


def test_names_tell_runs_apart(tmp_path):
    traces = plain_traces(1)
    runs = [write_run(tmp_path / folder / "run", traces, name=name) for folder, name in (("a", "m"), ("b", "m@step-1"))]
    assert run_names(runs) == ["m", "m@step-1"]
    again = write_run(tmp_path / "c" / "other", traces, name="m")
    assert run_names([runs[0], again]) == ["run", "other"]
    twin = write_run(tmp_path / "d" / "run", traces, name="m")
    assert run_names([runs[0], twin]) == [str(runs[0].folder), str(twin.folder)]
