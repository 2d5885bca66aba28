"""The scripts of `analyses/` that read checkpoints or benchmarks, and not runs."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from ling_probe.cost import cost, read_config
from ling_probe.model.files import SHIPPED
from ling_probe.model.load import load_native

SCRIPTS = Path(__file__).parent.parent / "analyses"


def run_script(monkeypatch, capsys, name, *words):
    """Rows that a script prints with --json."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words), "--json"])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_scaling_puts_what_a_checkpoint_costs_beside_what_it_can(monkeypatch, capsys):
    rows = run_script(monkeypatch, capsys, "scaling", SHIPPED / "ling-tiny", "--limit", 6)
    assert [row["family"] for row in rows] == ["arithmetic", "causal", "deduction", "all"]
    assert [row["problems"] for row in rows] == [2, 2, 2, 6]
    found = cost(read_config("ling-tiny"), context=1)
    for row in rows:
        assert row["parameters"] == found.total.parameters
        assert row["active"] == found.total.active
        assert 1 < row["flops"] / found.total.flops < 1.2  # attention to some hundred tokens more
        assert row["trained_flops"] == 3 * row["flops"] * row["trained_tokens"]
        assert row["loss_low"] <= row["loss"] <= row["loss_high"]
        assert row["share"] == pytest.approx(row["correct"] / row["problems"])
    assert rows[-1]["correct"] == sum(row["correct"] for row in rows[:-1])


def test_training_prints_the_log_and_draws_it(monkeypatch, capsys, tmp_path):
    rows = run_script(monkeypatch, capsys, "training", SHIPPED / "ling-tiny", "--figure", tmp_path / "curve.html")
    logged = [json.loads(line) for line in (SHIPPED / "ling-tiny" / "train.jsonl").read_text().splitlines()]
    assert rows == logged
    assert "MaxVio" in (tmp_path / "curve.html").read_text()


def test_segmentation_compares_rules_with_a_benchmark(monkeypatch, capsys):
    rows = run_script(monkeypatch, capsys, "segmentation", "stepbench", "--limit", 6)
    assert [(row["layout"], row["segmenter"]) for row in rows] == [
        ("written", "rules"), ("written", "sentences"), ("written", "lines"), ("removed", "sentences")]  # fmt: skip
    assert [row["f1"] for row in rows] == [1, 1, 1, 0]
    assert {row["benchmark"] for row in rows} == {"stepbench"}


@pytest.mark.parametrize(
    ("name", "words"),
    [("scaling", ["no checkpoint at"]), ("training", ["no train.jsonl in"]), ("segmentation", ["no benchmark"])],
)
def test_a_wrong_checkpoint_is_one_line(monkeypatch, capsys, tmp_path, name, words):
    with pytest.raises(SystemExit) as left:
        run_script(monkeypatch, capsys, name, tmp_path / "nowhere")
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words)


@pytest.mark.parametrize("words", [["--seed", "3"], ["--seed", "3", "--spread"]], ids=["initialised", "spread"])
def test_a_random_ling_has_learned_nothing_and_routes_by_the_rule(monkeypatch, capsys, tmp_path, words):
    for name in "ab":
        monkeypatch.setattr(sys, "argv", ["random_ling", str(tmp_path / name), *words])
        runpy.run_path(str(SCRIPTS / "random_ling.py"), run_name="__main__")
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == again
    random, trained = (load_native(name) for name in (str(tmp_path / "a"), "ling-tiny"))
    assert random.spec.n_experts == trained.spec.n_experts == 32
    assert random.verification.differ == 0
    for one, other in zip(random.gates().values(), trained.gates().values(), strict=True):
        assert one.expert_bias.abs().min() > 0
        assert abs(np.corrcoef(one.weight.detach().flatten(), other.weight.detach().flatten())[0, 1]) < 0.1
    monkeypatch.setattr(sys, "argv", ["random_ling", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPTS / "random_ling.py"), run_name="__main__")
    assert left.value.code == 2
    assert "exists already" in capsys.readouterr().err
