"""Parts written in the background, so that the model does not wait for the disk."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from ling_probe.run import Run
from ling_probe.trace import RoutingTrace


class PartWriter:
    """Appends parts to a run in one thread, in the order given; at most one part waits while another is written.

    Memory holds three parts at most: the one being gathered, the one that waits, the one being written. Leaving the block waits
    for what was given, after Ctrl-C too, so that it is in the run. After an error nothing more is written.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="part-writer")
        self._given: list[Future[None]] = []
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._wait_until_left(0)

    def write(self, part: Sequence[RoutingTrace], *, number: int | None = None) -> None:
        """Give a part to be written under its number; waits while another one waits already.

        Raises:
            Exception: Whatever `Run.append` raised for an earlier part, once.
        """
        self._wait_until_left(1)
        self._given.append(self._thread.submit(self._append, part, number))

    def _wait_until_left(self, count: int) -> None:
        while len(self._given) > count:
            self._given.pop(0).result()

    def _append(self, part: Sequence[RoutingTrace], number: int | None) -> None:
        if self._failed:
            return
        try:
            self._run.append(part, number=number)
        except BaseException:
            self._failed = True
            raise
