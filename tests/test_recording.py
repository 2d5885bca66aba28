import pytest

from ling_probe import recording
from ling_probe.benchmarks import read_benchmark
from ling_probe.errors import RunError, UsageError
from ling_probe.model.load import load_native
from ling_probe.run import Run
from ling_probe.steps import RULES_VERSION


@pytest.fixture(scope="module")
def loaded():
    return load_native("ling-tiny")


def test_an_interrupted_recording_goes_on_and_ends_the_same(loaded, tmp_path):
    benchmark = read_benchmark("stepbench", limit=30)
    whole = recording.record(loaded, benchmark, tmp_path / "whole", parts=6)
    calls = []

    def stop(done):
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording.record(loaded, benchmark, tmp_path / "cut", parts=6, progress=stop)
    half = Run.open(tmp_path / "cut")
    assert not half.is_complete
    assert 0 < len(half.done) < 30
    resumed = recording.record(loaded, benchmark, tmp_path / "cut", parts=6, resume=True)
    assert resumed.is_complete
    for name in ("sequences", "steps"):
        assert getattr(resumed, name).equals(getattr(whole, name))
    assert [part.files for part in resumed.manifest.parts] == [part.files for part in whole.manifest.parts]
    assert resumed.manifest.model["verification"]["differ"] == 0


def test_resuming_something_else_is_refused(loaded, tmp_path):
    benchmark = read_benchmark("stepbench", limit=3)
    recording.record(loaded, benchmark, tmp_path / "run")
    with pytest.raises(RunError, match="captured with another options"):
        recording.record(loaded, benchmark, tmp_path / "run", batch_tokens=77, resume=True)
    with pytest.raises(RunError, match="captured with another benchmark"):
        recording.record(loaded, read_benchmark("stepbench", split="longer", limit=3), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="exists already"):
        recording.record(loaded, benchmark, tmp_path / "run")


def test_the_summary_counts_answers(loaded, tmp_path):
    run = recording.record(loaded, read_benchmark("stepbench", limit=6), tmp_path / "run", max_new_tokens=20)
    families = run.manifest.summary["families"]
    assert {name: each["sequences"] for name, each in families.items()} == {"arithmetic": 2, "causal": 2, "deduction": 2}
    assert sum(each["correct"] for each in families.values()) == int(run.sequences["correct"].sum())


def test_a_run_says_how_its_steps_were_found(loaded, tmp_path):
    file = tmp_path / "made.jsonl"
    file.write_text('{"prompt": "compute 7+5\\n", "solution": "It is odd. So 7+5=12.\\nanswer: 12\\n"}\n')
    benchmark = read_benchmark(file)
    run = recording.record(loaded, benchmark, tmp_path / "run", steps="sentences")
    assert (run.manifest.options["steps"], run.manifest.options["step_rules"]) == ("sentences", RULES_VERSION)
    found = run.steps[["label", "text"]].to_numpy().tolist()
    assert found == [["other", "It is odd."], ["add", "So 7+5=12."], ["answer", "answer: 12"]]
    with pytest.raises(RunError, match="captured with another options"):
        recording.record(loaded, benchmark, tmp_path / "run", steps="lines", resume=True)
    with pytest.raises(UsageError, match="nobody annotated the steps of the solution of record made-0001"):
        recording.record(loaded, benchmark, tmp_path / "other", steps="annotated")
    assert not (tmp_path / "other").exists()
