"""Answers on disk: read where they fit, computed anew where anything they came from has changed."""

import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import synthetic_run, synthetic_traces
from typer.testing import CliRunner

from ling_probe.analysis import ANALYSES, SINGLE, answers, kept, kept_answers
from ling_probe.cli import app
from ling_probe.errors import UsageError
from ling_probe.report import write_report
from ling_probe.run import Run

TABLE, REFUSED = "load_balance", "logit_attribution"


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A run with all it keeps, and every answer about it; both are read only."""
    run = synthetic_run(tmp_path_factory.mktemp("kept") / "run", 24, parts=2)
    return run, dict(kept_answers(run, SINGLE))


@pytest.fixture
def copied(answered, tmp_path):
    return Run.open(shutil.copytree(answered[0].folder, tmp_path / "copy"))


@pytest.fixture
def counted(monkeypatch):
    """Names of analyses that were computed."""
    names = []

    def counting(run, asked, **options):
        names.extend(asked)
        return answers(run, asked, **options)

    monkeypatch.setattr(kept, "answers", counting)
    return names


def test_every_answer_comes_back_as_it_was(answered):
    run, computed = answered
    refused = []
    for name, answer in computed.items():
        found = kept.kept_answer(run, name)
        if isinstance(answer, UsageError):
            refused.append(name)
            assert str(found) == str(answer)
        else:
            pd.testing.assert_frame_equal(found, answer, check_exact=True)
    assert REFUSED in refused
    assert len(refused) < len(computed) / 2
    assert {path.name for path in (run.folder / "analysis").iterdir()} == {f"{name}.parquet" for name in SINGLE}


def test_what_is_kept_is_not_computed_again(copied, counted):
    found = dict(kept_answers(copied, [TABLE, REFUSED]))
    assert counted == []
    pd.testing.assert_frame_equal(found[TABLE], ANALYSES[TABLE].function(copied))
    assert isinstance(found[REFUSED], UsageError)
    dict(kept_answers(copied, [TABLE, REFUSED], fresh=True))
    assert counted == [TABLE, REFUSED]


def test_a_refusal_names_the_folder_where_the_run_lies_now(make_run, tmp_path):
    run = make_run(4)
    kept.keep_answer(run, TABLE, UsageError(f"{run.folder} holds nothing"))
    moved = Run.open(run.folder.rename(tmp_path / "moved"))
    assert str(kept.kept_answer(moved, TABLE)) == f"{moved.folder} holds nothing"


def test_answers_come_in_the_order_asked(copied, counted):
    (copied.folder / "analysis/coverage.parquet").unlink()
    names = ["expert_load", "coverage", TABLE]
    assert [name for name, _ in kept_answers(copied, names)] == names
    assert counted == ["coverage"]


def test_another_run_has_no_use_for_them(copied, answered, make_run):
    other = make_run(24, parts=2, seed=1)
    shutil.copytree(copied.folder / "analysis", other.folder / "analysis")
    assert not kept.is_kept(other, TABLE)
    assert kept.is_kept(copied, TABLE)


def test_a_part_more_makes_them_stale(make_run, tmp_path):
    run = make_run(6, finish=False)
    dict(kept_answers(run, [TABLE]))
    assert kept.is_kept(run, TABLE)
    more = synthetic_traces(run.spec, 9, rng=np.random.default_rng(1))
    run.append([trace for trace in more if trace.sequence_id not in run.done])
    assert not kept.is_kept(run, TABLE)


def test_other_code_makes_them_stale(copied, monkeypatch):
    monkeypatch.setattr(kept, "_computing", lambda: {"code": "other"})
    assert kept.kept_answer(copied, TABLE) is None


def test_a_causal_study_makes_them_stale(copied):
    assert kept.is_kept(copied, "causal_effects")
    (copied.folder / "causal").mkdir()
    (copied.folder / "causal/effects.parquet").write_bytes(b"new")
    assert not kept.is_kept(copied, "causal_effects")


@pytest.mark.parametrize("harm", ["cut", "noise", "pickle", "foreign", "folder", "renamed"])
def test_a_damaged_or_foreign_file_is_as_none(copied, counted, harm):
    path = copied.folder / f"analysis/{TABLE}.parquet"
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "noise":  # the pages are damaged, the metadata at the end is not
        path.write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    elif harm == "pickle":
        pd.to_pickle(pd.DataFrame({"layer": [1]}), path)
    elif harm == "foreign":
        pq.write_table(pa.table({"layer": [1]}), path)
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        shutil.copy(path.with_name("coverage.parquet"), path)
    ((_, answer),) = kept_answers(copied, [TABLE])
    assert counted == [TABLE]
    pd.testing.assert_frame_equal(answer, ANALYSES[TABLE].function(copied))


def test_a_folder_that_takes_nothing_keeps_nothing(make_run):
    run = make_run(6)
    (run.folder / "analysis").write_text("a file where the folder would be", encoding="utf-8")
    assert isinstance(dict(kept_answers(run, [TABLE]))[TABLE], pd.DataFrame)
    assert (run.folder / "analysis").is_file()


def test_a_full_disk_keeps_nothing_and_leaves_nothing(make_run, monkeypatch):
    run = make_run(6)

    def full(table, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.pq, "write_table", full)
    assert isinstance(dict(kept_answers(run, [TABLE]))[TABLE], pd.DataFrame)
    assert list((run.folder / "analysis").iterdir()) == []


def test_comparisons_are_not_kept(make_run, counted):
    one, two = make_run(6), make_run(6)
    for _ in range(2):
        ((_, answer),) = kept_answers(one, ["route_agreement"], against=[two])
        assert isinstance(answer, pd.DataFrame)
    assert counted == ["route_agreement"] * 2
    assert not (one.folder / "analysis").exists()


def test_a_run_with_kept_answers_is_whole(copied):
    assert copied.verify() == []


def test_a_report_is_the_same_from_kept_answers(answered, copied, tmp_path, counted):
    names = [TABLE, "label_specialisation", REFUSED]
    write_report(copied, tmp_path / "kept", analyses=names)
    assert counted == []
    write_report(copied, tmp_path / "fresh", analyses=names, fresh=True)
    assert counted == names
    for path in (each for each in (tmp_path / "kept").rglob("*") if each.is_file()):
        assert path.read_bytes() == (tmp_path / "fresh" / path.relative_to(tmp_path / "kept")).read_bytes(), path


def test_the_command_reads_what_is_kept_unless_told_otherwise(copied, counted):
    command = ["analyze", str(copied.folder), TABLE, "--json", "--workers", "1"]
    first = CliRunner().invoke(app, command)
    assert counted == []
    again = CliRunner().invoke(app, [*command, "--fresh"])
    assert counted == [TABLE]
    assert first.output == again.output
    assert first.exit_code == again.exit_code == 0
