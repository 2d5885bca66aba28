"""However a capture ends, what was written is whole, and --resume ends in the bytes of a capture that nothing disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from crashing import LOADED, benchmark, contents, record
from test_cli import COMMAND, ling, refused

from ling_probe import recording
from ling_probe.errors import RunError
from ling_probe.run import Run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, and end by signals")


@pytest.fixture(autouse=True)
def _real_capture(monkeypatch):
    monkeypatch.setattr(recording, "capture", recording.capture)


@pytest.fixture
def quick():
    """A folder in memory where there is one: a killed process loses no more there than on a disk, and syncing takes no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def crashing(what, folder, *args):
    script = Path(__file__).parent / "crashing.py"
    done = subprocess.run([sys.executable, script, what, folder, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_forty_kills_at_random_moments_lose_no_token(quick):
    told = crashing("kill", quick, 40, 3)
    assert told["kills"] >= 40
    assert told["runs"] >= 1
    assert told["moments"].get("inside a part", 0) + told["moments"].get("between a part and run.json", 0) > 0, told


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("crash", "9"), ("full", "2")])
def test_an_end_at_any_single_call_loses_no_token(quick, end, code):
    """The process dies, or the disk is full, instead of each sync, rename, link ... of recording and merging in turn."""
    told = crashing(end, quick)
    for codes in told.values():
        assert set(codes) <= {code, "0"}, told
        assert codes[code] > 15, told


def test_a_disk_that_fills_up_leaves_a_whole_run(quick):
    told = crashing("fill", quick)
    assert (told["code"], told["resumed"], told["same"], told["left"]) == (2, 0, True, [])
    assert 0 < told["held"] < 30


def test_memory_does_not_grow_with_the_parts(quick):
    """Ids, and an entry a part in the manifest, are a few hundred bytes a part; its tokens are not kept."""
    told = crashing("grow", quick)
    assert told["written"] > 16 << 20
    assert told["after"]["120"] - told["after"]["40"] < told["written"] / 2


@pytest.mark.parametrize("how", ["cut short", "changed", "gone", "file gone"])
def test_a_damaged_part_is_named_and_captured_again(tmp_path, how):
    record(tmp_path / "whole", 12, 4)
    record(tmp_path / "run", 12, 4)
    part = tmp_path / "run" / "parts" / "00002"
    data = (part / "tokens.parquet").read_bytes()
    if how == "gone":
        shutil.rmtree(part)
    elif how == "file gone":
        (part / "steps.parquet").unlink()
    else:
        (part / "tokens.parquet").write_bytes(data[:-9] if how == "cut short" else data[:99] + b"?" + data[100:])
    with pytest.raises(RunError, match=r"part 00002 .*repeat its capture with --redo-damaged"):
        Run.open(tmp_path / "run").verify()
    if "gone" not in how:
        before = contents(tmp_path / "run")
        assert record(tmp_path / "run", 12, 4, resume=True).is_complete
        assert contents(tmp_path / "run") == before
    with pytest.raises(RunError, match="another options"):
        record(tmp_path / "run", 12, 6, redo_damaged=True)
    mended = record(tmp_path / "run", 12, 4, redo_damaged=True)
    assert mended.verify() == []
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_foreign_files_are_reported_and_left(tmp_path):
    run = record(tmp_path / "run", 6, 2)
    (run.folder / "report.html").write_text("a report beside the parts")
    for name in ("notes.txt", "00000/copy.parquet", "00007/tokens.parquet"):
        path = run.folder / "parts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("?")
    assert run.verify() == ["parts/00000/copy.parquet", "parts/00007", "parts/notes.txt"]
    assert "parts/notes.txt" in json.loads(ling("inspect", run.folder, "--verify", "--json").stdout)["foreign"]
    assert (run.folder / "parts" / "notes.txt").exists()


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    record(tmp_path / "run", 6, 2)
    run = Run.open(tmp_path / "run")
    other = Run.open(tmp_path / "run")
    with run.writing():
        with run.writing(), pytest.raises(RunError, match=rf"is being written by process {os.getpid()} on .*; let it end"):
            record(tmp_path / "run", 6, 2, resume=True)
        with pytest.raises(RunError, match="is being written"), other.writing():
            pass
    with other.writing():
        pass
    assert sorted(path.name for path in run.folder.iterdir()) == ["experts.safetensors", "parts", "run.json"]


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    run = record(tmp_path / "run", 6, 2)
    script = (
        "import sys, time; from ling_probe.run import Run\n"
        "with Run.open(sys.argv[1]).writing(): print(1, flush=True), time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script, run.folder], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"1\n"
        with pytest.raises(RunError, match=f"is being written by process {writer.pid}"), run.writing():
            pass
        writer.kill()
    assert (run.folder / "run.lock").exists()
    with run.writing():
        pass
    assert not (run.folder / "run.lock").exists()


@pytest.mark.slow
def test_control_c_says_one_line_and_leaves_a_run_to_go_on_with(tmp_path):
    command = [
        "capture",
        "ling-tiny",
        "stepbench",
        "--limit",
        "200",
        "--parts",
        "100",
        "--batch-tokens",
        "512",
        "--generate",
        "99",
    ]
    command += ["--out", str(tmp_path / "run")]
    with subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not (tmp_path / "run" / "parts" / "00001").exists():
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate()
    assert running.returncode == 130, told
    assert told.splitlines()[-1].startswith("ling-probe: interrupted; ")
    assert "Traceback" not in told
    run = Run.open(tmp_path / "run")
    assert f"holds {len(run.done)} sequences, all whole; repeat the command with --resume" in told
    assert 1 < len(run.done) < 200
    with run.writing():
        assert "is being written by process" in refused(*command, "--resume")


def test_what_a_resumed_run_must_share(tmp_path):
    """A run of other texts under the same ids and file digest is not gone on with."""
    record(tmp_path / "run", 6, 2)
    other = benchmark(6)
    changed = replace(other, records=(replace(other.records[0], prompt="something else"), *other.records[1:]))
    with pytest.raises(RunError, match="captured with another benchmark"):
        recording.record(LOADED, changed, tmp_path / "run", parts=2, resume=True)
