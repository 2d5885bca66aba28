import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import synthetic_run

from ling_probe.analysis import Verdict
from ling_probe.model.files import SHIPPED

COMMAND = [str(Path(sys.executable).parent / "ling-probe")]


def ling(*args, cwd=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, cwd=cwd, check=False, env=environment)


def refused(*args, cwd=None):
    """The one line on standard error of a call that must exit with 2."""
    done = ling(*args, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_imports_nothing_heavy():
    heavy = [
        "torch",
        "transformers",
        "transformer_lens",
        "pandas",
        "numpy",
        "plotly",
        "streamlit",
        "pyarrow",
        "sklearn",
        "scipy",
    ]
    script = f"import sys, ling_probe.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_reading_a_run_needs_no_torch(tmp_path):
    synthetic_run(tmp_path / "run", 9)
    script = (
        "import sys\nfrom pathlib import Path\nfrom ling_probe.run import Run\nfrom ling_probe.report import write_report\n"
        "write_report(Run.open(sys.argv[1]), Path(sys.argv[2]), analyses=['load_balance'])\n"
        "print([name for name in ('torch', 'transformers', 'transformer_lens', 'streamlit') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_capture_inspect_analyze_report(tmp_path):
    run = tmp_path / "run"
    done = ling("capture", "ling-tiny", "stepbench", "--limit", 24, "--out", run, "--keep", "logits")
    assert done.returncode == 0, done.stderr
    assert "0 of 1,024 differ" in done.stdout
    facts = json.loads(ling("inspect", run, "--verify", "--json").stdout)
    assert (facts["sequences"], facts["state"], facts["verified"]) == (24, "complete", True)
    rows = [json.loads(line) for line in ling("analyze", run, "expert_load", "load_balance", "--json").stdout.splitlines()]
    assert {row["analysis"] for row in rows} == {"expert_load", "load_balance", "index"}
    index = [row for row in rows if row["analysis"] == "index"]
    assert [row["name"] for row in index] == ["expert_load", "load_balance"]
    assert {row["verdict"] for row in index} <= {each.value for each in Verdict}
    assert sum(row["load"] for row in rows if row["analysis"] == "expert_load" and row["layer"] == 2) == pytest.approx(1)
    told = ling("analyze", run, "load_balance").stdout
    assert "How evenly" in told
    assert "What was asked and found" not in told
    assert "label_specialisation" in ling("analyze", "--list").stdout
    done = ling("report", run, "--out", tmp_path / "page", "--only", "load_balance")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page" / "report.html").stat().st_size > 100_000
    assert "exists already" in refused("capture", "ling-tiny", "stepbench", "--out", run)
    assert json.loads(ling("inspect", run, "--verify", "--json").stdout) == facts


def test_evaluate_prints_accuracy_and_balance():
    done = ling("evaluate", "ling-tiny", "--limit", 6, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    accuracy = {row["family"]: row for row in rows if row["table"] == "accuracy" or "family" in row}
    assert accuracy["all"]["problems"] == 6
    assert all(row["ci_low"] <= row["share"] <= row["ci_high"] for row in accuracy.values())
    assert [row["layer"] for row in rows if "max_vio" in row] == [1, 2, 3, 4]


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(SHIPPED / "ling-tiny", tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_checkpoint():
    assert "no checkpoint at nowhere" in refused("evaluate", "nowhere")


def test_a_truncated_checkpoint(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is truncated" in refused("evaluate", checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architectures": ["BailingMoeForCausalLM"]}, "not Ling 2.0"), ({"n_group": 3}, "n_group 3 does not divide 32 experts")],
)
def test_a_configuration_that_is_no_ling_2(checkpoint, change, message):
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert message in refused("evaluate", checkpoint)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{not json", "line 2: not JSON"), ('{"problem": "x"}', 'line 2: no field "prompt" (found: "problem"); name it with')],
)
def test_a_bad_benchmark_line_leaves_nothing_behind(tmp_path, line, message):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "compute 1+2"}\n' + line + "\n")
    assert message in refused("capture", "ling-tiny", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_missing_part(tmp_path):
    run = synthetic_run(tmp_path / "run", 9)
    shutil.rmtree(tmp_path / "run" / "parts" / run.manifest.parts[1].name)
    for verb in ("inspect", "report", "explore"):
        assert "part 00001 lacks" in refused(verb, tmp_path / "run")
    assert "part 00001 lacks" in refused("analyze", tmp_path / "run", "all")


def test_words_that_are_not_there(tmp_path):
    synthetic_run(tmp_path / "run", 9)
    assert 'no analysis "magic"; these there are' in refused("analyze", tmp_path / "run", "magic")
    assert "name a run and an analysis" in refused("analyze")
    assert 'no recipe "huge"' in refused("train", "--preset", "huge", "--out", tmp_path / "x")
    assert "no split" in refused("evaluate", "ling-tiny", "--split", "train")
    assert 'no device "tpu"' in refused("evaluate", "ling-tiny", "--device", "tpu")


def test_hostile_names_do_not_steer_the_terminal(tmp_path):
    message = refused("evaluate", "\x1b[31mred\x07")
    assert "\x1b" not in message
    assert "\x07" not in message


def test_train_stops_after_the_asked_steps(tmp_path):
    done = ling("train", "--steps", 20, "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "step     20" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "exists already" in refused("train", "--steps", 20, "--out", tmp_path / "model")


@pytest.mark.slow
def test_the_demo_tells_what_it_found(tmp_path):
    done = ling("demo", "--limit", 60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ling-tiny on stepbench test: 60 problems" in done.stdout
    assert "ling-probe explore runs/demo" in done.stdout
    first = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())["headline"]
    for row in first["accuracy"]:
        assert f"{row['correct']:>4} of {row['judged']} correct" in done.stdout
    again = ling("demo", "--limit", 60, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
