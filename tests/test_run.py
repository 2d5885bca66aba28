import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_run, synthetic_spec, synthetic_traces

from ling_probe.errors import InterventionError, RunError, UsageError
from ling_probe.interventions import exclude, force
from ling_probe.run import Run

SPEC = synthetic_spec()
ALL = {"weights": True, "columns": ("loss", "token", "sequence_id")}


def traces_of(n_sequences=4, seed=0, spec=SPEC, **options):
    return synthetic_traces(spec, n_sequences, rng=np.random.default_rng(seed), **options)


def empty_run(folder, spec=SPEC):
    return Run.create(folder, spec=spec, model={"name": "m"}, benchmark={"name": "b"}, options={"batch": 8})


def edit_manifest(run, **changes):
    path = run.folder / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (values | changes).items() if value is not ...}))


def assert_holds(run, traces):
    """Everything that was appended comes back, weights rounded to 16 bits."""
    batches = list(run.batches(**ALL))
    assert run.sequences["sequence_id"].tolist() == [trace.sequence_id for trace in traces]
    assert run.sequences["correct"].tolist() == [trace.correct for trace in traces]
    assert [json.loads(meta) for meta in run.sequences["meta"]] == [trace.meta for trace in traces]
    for name in ("benchmark", "family", "split", "prompt", "completion", "answer", "predicted"):
        assert run.sequences[name].tolist() == [getattr(trace, name) for trace in traces]
    for row, trace in enumerate(traces):
        (batch,) = [batch for batch in batches if row in batch.sequence]
        mine = batch.sequence == row
        assert batch.position[mine].tolist() == list(range(trace.n_tokens))
        for stored, given_ in [
            (batch.token_id, trace.token_ids),
            (batch.segment, trace.segment),
            (batch.step, trace.step),
            (batch.expert_ids, trace.expert_ids),
            (batch.extra["loss"], trace.loss),
            (batch.weights, trace.weights.astype(np.float16).astype(np.float32)),
        ]:
            np.testing.assert_array_equal(stored[mine], given_)
            assert stored.dtype == given_.dtype
        assert tuple(batch.extra["token"][mine]) == trace.tokens
        assert set(batch.extra["sequence_id"][mine]) == {trace.sequence_id}
        steps = run.steps[run.steps["sequence"] == row].drop(columns="sequence")
        assert steps.to_dict("records") == [vars(span) for span in trace.steps]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    n_experts=st.sampled_from([16, 260]),
    layers=st.sampled_from([(1, 2, 3), (0,), (1, 11)]),
)
def test_round_trip(tmp_path_factory, seed, sizes, n_experts, layers):
    spec = synthetic_spec(n_layers=12, routed_layers=layers, n_experts=n_experts, vocab_size=64)
    traces = traces_of(sum(sizes), seed, spec)
    run = empty_run(tmp_path_factory.mktemp("round") / "run", spec)
    for start, stop in zip(np.cumsum([0, *sizes[:-1]]), np.cumsum(sizes), strict=True):
        run.append(traces[start:stop])
    assert_holds(run, traces)
    assert_holds(Run.open(run.folder), traces)
    assert [part.sequences for part in run.manifest.parts] == sizes
    assert sum(part.tokens for part in run.manifest.parts) == sum(trace.n_tokens for trace in traces)


def test_texts_of_any_script_and_unknown_outcomes_come_back(tmp_path):
    trace = traces_of(1)[0]
    odd = replace(
        trace, prompt='≤ 数\n\t"', tokens=("\ufffd", "\n", *trace.tokens[2:]), correct=None, meta={"a": [1, None, "é"]}
    )
    odd = replace(odd, steps=tuple(replace(span, correct=None) for span in odd.steps))
    run = empty_run(tmp_path / "run")
    run.append([odd])
    row = run.sequences.iloc[0]
    assert (row["prompt"], row["correct"], json.loads(row["meta"])) == (odd.prompt, pd.NA, odd.meta)
    assert run.steps["correct"].isna().all()
    (batch,) = run.batches(columns=("token",))
    assert tuple(batch.extra["token"]) == odd.tokens


def test_layers_come_in_the_order_asked_and_only_what_is_asked(make_run):
    run = make_run(6)
    for whole, some in zip(run.batches(weights=True), run.batches(layers=[3, 1]), strict=True):
        np.testing.assert_array_equal(some.expert_ids, whole.expert_ids[:, [2, 0]])
        assert some.weights is None
        assert some.extra == {}
    assert [batch.expert_ids.shape[1] for batch in run.batches(layers=[])] == [0, 0]


def test_one_layer_is_read_without_the_rest(make_run, monkeypatch):
    run, read = make_run(6), []
    original = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, columns: read.append(columns) or original(self, columns=columns))
    list(run.batches(layers=[2], columns=["loss"]))
    assert {"experts_2", "loss"} < set(read[-1])
    assert not {"experts_1", "experts_3", "weights_2", "token"} & set(read[-1])


def test_extras_come_back_per_layer_in_16_bits_or_whole(tmp_path):
    traces = traces_of(3, keep=("logits", "shared", "contribution"))
    run = empty_run(tmp_path / "run")
    run.append(traces)
    (batch,) = run.batches(layers=[3, 1], columns=("logits", "shared", "contribution"))
    for name, array in batch.extra.items():
        given_ = np.concatenate([trace.extras[name] for trace in traces])[:, [2, 0]]
        stored = np.float32 if name == "shared" else np.float16
        np.testing.assert_array_equal(array, given_.astype(stored).astype(np.float32))
    assert run.manifest.parts[0].extras == ("contribution", "logits", "shared")
    assert batch.extra["shared"].ndim == 2
    assert next(run.batches(layers=[], columns=("logits",))).extra["logits"].shape[1] == 0


def test_extras_too_large_for_16_bits_are_refused_not_clipped(tmp_path):
    trace = traces_of(1)[0]
    large = replace(trace, extras={"contribution": np.full((trace.n_tokens, 3, 4), 1e5)})
    with pytest.raises(
        UsageError,
        match=r"extra 'contribution' of layer 1 reaches 1e\+05; it is stored in 16 bits, which end at 65504: capture "
        "into a new folder without it, or keep whole vectors",
    ):
        empty_run(tmp_path / "run").append([large])


def test_residual_norms_come_back_exactly_for_dense_layers_too(tmp_path):
    traces = [replace(trace, extras={"residual": trace.extras["residual"].astype(np.float32) * 1e6})
              for trace in traces_of(3, keep=("residual",))]  # fmt: skip
    run = empty_run(tmp_path / "run")
    run.append(traces)
    given_ = np.concatenate([trace.extras["residual"] for trace in traces])
    for layers in (None, [2], []):
        (batch,) = run.batches(layers=layers, columns=("residual",))
        np.testing.assert_array_equal(batch.extra["residual"], given_)
    plain = pd.read_parquet(run.folder / "parts" / "00000" / "tokens.parquet")
    np.testing.assert_array_equal(plain["residual_0"], given_[:, 0])


def test_extras_are_the_same_in_every_part(tmp_path):
    run = empty_run(tmp_path / "run")
    run.append(traces_of(2))
    with pytest.raises(UsageError, match=r"has extras shared; every one of .* has none"):
        run.append(traces_of(3, keep=("shared",))[2:])


def test_unknown_columns_and_layers_are_refused_before_reading(make_run):
    run = make_run(3)
    with pytest.raises(UsageError, match="has no column logits; it has token, loss, sequence_id"):
        run.batches(columns=("logits",))
    with pytest.raises(UsageError, match="layer 0 of synthetic has no router"):
        run.batches(layers=[0])


def test_plain_pandas_duckdb_and_polars_read_a_run(make_run):
    run = make_run(4)
    files = run.folder / "parts" / "*" / "tokens.parquet"
    batch = next(run.batches(weights=True, columns=("token",)))
    plain = pd.read_parquet(run.folder / "parts" / "00000" / "tokens.parquet")
    np.testing.assert_array_equal(np.stack(plain["experts_2"]), batch.expert_ids[:, 1])
    assert plain["token"].tolist() == list(batch.extra["token"])
    first = pl.read_parquet(files).head(len(plain))
    np.testing.assert_array_equal(first["experts_2"].to_numpy(), batch.expert_ids[:, 1])
    np.testing.assert_array_equal(first["weights_2"].to_numpy().astype(np.float32), batch.weights[:, 1])
    counted = duckdb.sql(f"select expert, count(*) n from (select unnest(experts_2) expert from '{files}') group by 1").df()
    ids = np.concatenate([batch.expert_ids[:, 1].ravel() for batch in run.batches()])
    assert dict(zip(counted["expert"], counted["n"], strict=True)) == {int(e): int((ids == e).sum()) for e in np.unique(ids)}
    segments = duckdb.sql(f"select distinct segment from '{files}'").df()["segment"]
    assert set(segments) == {"prompt", "reasoning", "answer", "special"}


def test_an_empty_run_has_typed_empty_tables(tmp_path):
    run = empty_run(tmp_path / "run")
    assert len(run.sequences) == len(run.steps) == len(run.done) == 0
    assert run.steps.columns.tolist() == ["sequence", "step", "label", "text", "start", "stop", "correct"]
    assert list(run.batches(**ALL)) == []
    assert run.steps["start"].dtype == np.int32


def test_the_manifest_says_what_was_run(tmp_path):
    run = synthetic_run(tmp_path / "run", 5, interventions=[exclude(2, [3], labels=["add"])], seed=7)
    again = Run.open(run.folder)
    assert again.manifest == run.manifest
    assert again.manifest.interventions == (exclude(2, [3], labels=["add"]),)
    assert (again.manifest.seed, again.spec, again.is_complete) == (7, run.spec, True)
    assert again.manifest.model["verification"] == {"choices": 100, "differ": 0, "near_ties": 0}
    assert {"python", "numpy", "pyarrow"} <= set(again.manifest.versions)
    assert again.manifest.created.endswith("+00:00")
    assert again.manifest.finished >= again.manifest.created
    assert list(again.manifest.to_dict()) == list(json.loads((run.folder / "run.json").read_text()))


def test_resume_goes_on_where_it_stopped(tmp_path):
    traces = traces_of(6)
    empty_run(tmp_path / "run").append(traces[:2])
    run = Run.open(tmp_path / "run")
    assert not run.is_complete
    run.append([trace for trace in traces if trace.sequence_id not in run.done])
    assert run.done == {trace.sequence_id for trace in traces}
    assert_holds(run, traces)


def test_a_sequence_is_held_once(tmp_path):
    run, traces = empty_run(tmp_path / "run"), traces_of(2)
    with pytest.raises(RunError, match="has sequence arithmetic-0000 already"):
        run.append([traces[0], traces[0]])
    run.append(traces)
    with pytest.raises(RunError, match="has sequence deduction-0001 already"):
        run.append(traces[1:])


@pytest.mark.parametrize("moment", ["rename", "replace"])
def test_an_interrupted_append_leaves_the_run_readable_and_resumable(tmp_path, monkeypatch, moment):
    """Before the part is renamed, and between that and the new run.json."""
    run, traces = empty_run(tmp_path / "run"), traces_of(6)
    run.append(traces[:2])

    def lost(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, moment, lost)
    with pytest.raises(KeyboardInterrupt):
        run.append(traces[2:4])
    monkeypatch.undo()
    assert len(list((run.folder / "parts").iterdir())) == 2
    again = Run.open(run.folder)
    again.verify()
    assert_holds(again, traces[:2])
    again.append(traces[4:])
    assert_holds(again, [*traces[:2], *traces[4:]])
    assert sorted(folder.name for folder in (run.folder / "parts").iterdir()) == ["00000", "00001"]
    again.finish()
    assert sorted(path.name for path in run.folder.iterdir()) == ["parts", "run.json"]


def test_a_run_object_goes_on_after_its_own_failed_append(tmp_path, monkeypatch):
    run, traces = empty_run(tmp_path / "run"), traces_of(4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RunError, match=r"part 00000 could not be written \(No space left on device\); the 0 sequences"):
        run.append(traces[:2])
    assert not list((run.folder / "parts").iterdir())
    monkeypatch.undo()
    run.append(traces[:2])
    run.append(traces[2:])
    assert_holds(run, traces)


def test_two_writers_do_not_undo_each_other(tmp_path):
    one, traces = empty_run(tmp_path / "run"), traces_of(4)
    other = Run.open(one.folder)
    one.append(traces[:2])
    with pytest.raises(RunError, match="changed by another process"):
        other.append(traces[2:])
    assert_holds(Run.open(one.folder), traces[:2])


def test_a_complete_run_is_closed(make_run):
    run = make_run(3)
    with pytest.raises(RunError, match="is complete and cannot be added to"):
        run.append(traces_of(4)[3:])
    with pytest.raises(RunError, match="is complete"):
        run.finish()


def test_create_touches_nothing_that_exists(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(RunError, match="mine exists already and is left as it is"):
        empty_run(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(RunError, match="exists already"):
        empty_run(folder / "notes.txt")


@pytest.mark.parametrize("options", [{"path": Path("x")}, {"loss": float("nan")}])
def test_create_refuses_what_json_cannot_hold_and_leaves_no_folder(tmp_path, options):
    with pytest.raises(UsageError, match="plain finite JSON values only"):
        Run.create(tmp_path / "run", spec=SPEC, model={}, benchmark={}, options=options)
    assert not (tmp_path / "run").exists()


def test_create_refuses_interventions_the_model_cannot_carry_out(tmp_path):
    for interventions in ([exclude(0, [1])], [exclude(2, [7]), force(2, [7])]):
        with pytest.raises(InterventionError):
            synthetic_run(tmp_path / "run", 1, interventions=interventions)
    assert not (tmp_path / "run").exists()


def test_append_refuses_traces_of_another_model_and_none(tmp_path):
    run = empty_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"is not of synthetic, the model of .*: the specs differ in top_k"):
        run.append(traces_of(1, spec=synthetic_spec(top_k=3)))
    with pytest.raises(UsageError, match="no traces to append"):
        run.append([])
    with pytest.raises(UsageError, match="meta of sequence arithmetic-0000 holds plain finite JSON"):
        run.append([replace(traces_of(1)[0], meta={"a": {1, 2}})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, and this ling-probe reads up to schema 1; install a newer one"),
        ({"schema": 2, "spec": ..., "parts": ...}, "has schema 2"),
        ({"schema": ...}, "is not the manifest of a run: no schema number"),
        ({"schema": "1"}, "no schema number"),
        ({"parts": ..., "spec": ...}, "lacks parts, spec"),
        ({"spec": {"name": "x"}}, "is not the manifest of a run"),
        ({"parts": 3}, "is not the manifest of a run"),
        ({"parts": [{"name": "../..", "extras": [], "files": {}}]}, "is not the manifest of a run"),
        ({"interventions": [{"kind": "ablate"}]}, "is not the manifest of a run"),
        ({"state": "shut"}, "has state 'shut'; expected open or complete"),
    ],
)
def test_a_manifest_too_new_foreign_or_damaged_is_refused(make_run, changes, message):
    run = make_run(2)
    edit_manifest(run, **changes)
    with pytest.raises(RunError, match=message):
        Run.open(run.folder)


@pytest.mark.parametrize("name", ["../../elsewhere", "../00000", "00000/../../x", "0000", "00000\n"])
def test_part_names_cannot_lead_out_of_the_folder(make_run, name):
    run = make_run(2)
    part = json.loads((run.folder / "run.json").read_text())["parts"][0]
    edit_manifest(run, parts=[part | {"name": name}])
    with pytest.raises(RunError, match="expected five digits"):
        Run.open(run.folder)


@pytest.mark.parametrize("text", ["", "[]", '{"foo": 1}', "\xff", '{"schema": 1, "created"'])
def test_what_is_not_a_manifest_is_refused(make_run, text):
    run = make_run(2)
    (run.folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"run\.json is not"):
        Run.open(run.folder)


def test_what_is_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"has no run\.json; name the folder of a run"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="nowhere is no folder"):
        Run.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["sequences", "steps", "tokens"])
def test_a_missing_file_or_part_is_named(make_run, name):
    run = make_run(4)
    (run.folder / "parts" / "00001" / f"{name}.parquet").unlink()
    with pytest.raises(RunError, match=rf"part 00001 lacks {name}\.parquet, which run\.json lists"):
        Run.open(run.folder)
    shutil.rmtree(run.folder / "parts" / "00000")
    with pytest.raises(RunError, match="part 00000 lacks"):
        Run.open(run.folder)


@pytest.mark.parametrize("name", ["sequences", "steps", "tokens"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_found_by_verify_and_named_when_read(make_run, name, keep):
    run = make_run(4)
    path = run.folder / "parts" / "00001" / f"{name}.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    again = Run.open(run.folder)
    with pytest.raises(RunError, match=rf"{name}\.parquet of part 00001 is not what was written"):
        again.verify()
    with pytest.raises(RunError, match=rf"00001/{name}\.parquet cannot be read \(.*\); it is damaged"):
        list(getattr(again, name) if name != "tokens" else again.batches())


def test_one_changed_byte_is_found_by_verify(make_run):
    run = make_run(4)
    run.verify()
    path = run.folder / "parts" / "00000" / "tokens.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"tokens\.parquet of part 00000 is not what was written"):
        run.verify()


def test_a_token_file_of_another_run_is_refused(make_run):
    run, other = make_run(2, parts=1), make_run(5, parts=1)
    shutil.copy(other.folder / "parts/00000/tokens.parquet", run.folder / "parts/00000/tokens.parquet")
    with pytest.raises(RunError, match="which this run does not have"):
        list(run.batches())
    pq.write_table(
        pq.read_table(run.folder / "parts/00000/tokens.parquet").drop(["experts_2"]), run.folder / "parts/00000/tokens.parquet"
    )
    with pytest.raises(RunError, match="lacks column experts_2"):
        list(run.batches())
