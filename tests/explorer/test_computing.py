"""Answers that no run keeps yet: computed in a process of their own, kept, and said where they fail."""

import os
import sys
import time

import pandas as pd
import pytest
from exploring import chart, error, values

from ling_probe.analysis import expert_load, load_balance
from ling_probe.errors import RunError, UsageError


@pytest.fixture
def apart(visit, monkeypatch, make_run):
    """Visits to runs that all count as large."""
    visit(folder=make_run(3).folder)
    monkeypatch.setattr(sys.modules["opened"], "SMALL", 0)
    return visit


def computing():
    return sys.modules["computing"]


def asked(desk, key):
    for _ in range(600):
        if (answer := desk.ask(key)) is not None:
            return answer
        time.sleep(0.1)
    raise TimeoutError(key)


def die(folder, name, sender) -> None:
    os._exit(9)


def test_a_page_waits_for_a_process_and_its_answer_is_kept(apart, make_run):
    run = make_run(9)
    app = apart(folder=run.folder)
    assert not app.exception
    assert not app.caption
    kept = {path.stem: path.stat().st_mtime_ns for path in (run.folder / "analysis").iterdir()}
    assert set(kept) == {"load_balance", "expert_load", "label_specialisation"}
    load = expert_load(run)["log2_ratio"].to_numpy("float32")
    assert (values(chart(app, 1)[0]["z"]).ravel() == load).all()
    apart(folder=run.folder)
    assert kept == {path.stem: path.stat().st_mtime_ns for path in (run.folder / "analysis").iterdir()}


def test_damage_in_the_process_is_one_line(apart, make_run):
    run = make_run(4, parts=1)
    tokens = run.folder / "parts/00000/tokens.parquet"
    tokens.write_bytes(tokens.read_bytes()[:500])
    assert "tokens.parquet cannot be read" in error(apart(folder=run.folder))


def test_one_question_at_a_time(apart, make_run):
    run, desk = make_run(6), computing().Desk()
    first, second = ((str(run.folder), "digest", name) for name in ("load_balance", "logit_attribution"))
    assert desk.ask(first) is None
    assert desk.ask(second) is None
    pd.testing.assert_frame_equal(asked(desk, first), load_balance(run))
    assert isinstance(asked(desk, second), UsageError)


def test_a_process_that_dies_is_said_and_can_be_tried_again(apart, make_run, monkeypatch):
    run, desk = make_run(6), computing().Desk()
    key = (str(run.folder), "digest", "load_balance")
    with monkeypatch.context() as patch:
        patch.setattr(computing(), "send_answer", die)
        with pytest.raises(RunError, match=r"load_balance ended with 9.* try ling-probe analyze"):
            asked(desk, key)
    assert isinstance(asked(desk, key), pd.DataFrame)
