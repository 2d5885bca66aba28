import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from synthetic import synthetic_spec, synthetic_traces

from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.writing import PartWriter

SPEC = synthetic_spec()


@pytest.fixture
def parts():
    traces = synthetic_traces(SPEC, 12, rng=np.random.default_rng(0), keep=("contribution",))
    return [traces[start : start + 2] for start in range(0, 12, 2)]


def empty_run(folder):
    return Run.create(folder, spec=SPEC, model={}, benchmark={}, options={})


def test_parts_are_those_of_the_foreground_byte_for_byte_and_in_order(tmp_path, parts):
    plain, behind = empty_run(tmp_path / "plain"), empty_run(tmp_path / "behind")
    for part in parts:
        plain.append(part)
    with PartWriter(behind) as writer:
        for part in parts:
            writer.write(part)
    assert behind.manifest.parts == plain.manifest.parts
    assert Run.open(behind.folder).manifest.parts == plain.manifest.parts
    behind.verify()


class Slow:
    """A run whose parts are written when they are let through."""

    def __init__(self, fail_at=()) -> None:
        self.gate, self.begun, self.written, self.threads = threading.Semaphore(0), threading.Semaphore(0), [], set()
        self.fail_at, self.numbers = fail_at, []

    def append(self, part, *, number=None):
        self.numbers.append(number)
        self.begun.release()
        self.threads.add(threading.current_thread())
        self.gate.acquire()
        if part in self.fail_at:
            raise RunError(f"part {part} cannot be written")
        self.written.append(part)


def test_one_part_waits_while_one_is_written_and_the_next_giver_is_held():
    run = Slow()
    with PartWriter(run) as writer, ThreadPoolExecutor(1) as other:
        writer.write("a", number=3)
        writer.write("b")
        assert run.begun.acquire(timeout=10)
        third = other.submit(writer.write, "c")
        with pytest.raises(TimeoutError):
            third.result(timeout=0.2)
        assert run.written == []
        run.gate.release()
        third.result(timeout=10)
        run.gate.release(2)
    assert run.written == ["a", "b", "c"]
    assert run.numbers == [3, None, None]
    assert threading.current_thread() not in run.threads
    assert len(run.threads) == 1


def test_an_error_comes_out_as_it_is_and_nothing_follows_it():
    run = Slow(fail_at=("b",))
    run.gate.release(10)
    given = []
    with pytest.raises(RunError, match="part b cannot be written"), PartWriter(run) as writer:  # noqa: PT012
        for part in "abcdef":
            writer.write(part)
            given.append(part)
    assert run.written == ["a"]
    assert "f" not in given


def test_the_error_of_the_last_part_is_not_lost():
    run = Slow(fail_at=("a",))
    run.gate.release(10)
    with pytest.raises(RunError, match="part a"), PartWriter(run) as writer:
        writer.write("a")


def test_what_a_part_may_not_be_is_the_same_error_as_in_the_foreground(tmp_path, parts):
    run = empty_run(tmp_path / "run")
    with pytest.raises(RunError, match="has sequence arithmetic-0000 already"), PartWriter(run) as writer:  # noqa: PT012
        writer.write(parts[0])
        writer.write(parts[0])
    with pytest.raises(UsageError, match="no traces"), PartWriter(run) as writer:
        writer.write([])
    assert len(Run.open(run.folder).manifest.parts) == 1


def test_an_interruption_keeps_what_was_given_and_leaves_the_run_readable(tmp_path, parts):
    run = empty_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), PartWriter(run) as writer:  # noqa: PT012
        writer.write(parts[0])
        writer.write(parts[1])
        raise KeyboardInterrupt
    again = Run.open(run.folder)
    again.verify()
    assert again.done == {trace.sequence_id for part in parts[:2] for trace in part}
    with PartWriter(again) as writer:
        writer.write(parts[2])
    assert len(Run.open(run.folder).manifest.parts) == 3
