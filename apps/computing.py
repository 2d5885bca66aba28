"""Answers that no run keeps yet, computed one after another in a process beside the server.

A page that waits for one says for how long. It can be left: the process goes on, and the answer is there for the next.
"""

import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pandas as pd
import streamlit as st

from ling_probe.analysis.asking import Answer
from ling_probe.analysis.kept import send_answer
from ling_probe.errors import LingProbeError, RunError, UsageError
from ling_probe.spawning import nobodys_main

Key = tuple[str, str, str]
"""Folder of a run, the digest of its manifest, name of an analysis."""


class Desk:
    """Takes one question at a time, from all sessions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: tuple[Key, BaseProcess, Connection] | None = None
        self._last: tuple[Key, Answer | LingProbeError] | None = None

    def ask(self, key: Key) -> Answer | None:
        """The answer once it is there; until then, see to it that it will be.

        Raises:
            LingProbeError: Computing it failed; asking again tries again.
        """
        with self._lock:
            self._collect()
            if self._last and self._last[0] == key:
                answer = self._last[1]
                if isinstance(answer, UsageError | pd.DataFrame):
                    return answer
                self._last = None
                raise answer
            if self._at_work is None:
                self._start(key)
        return None

    def _start(self, key: Key) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        # A daemon ends with the server.
        process = context.Process(target=send_answer, args=(key[0], key[2], sender), daemon=True)
        with nobodys_main():
            process.start()
        sender.close()
        self._at_work = key, process, receiver

    def _collect(self) -> None:
        if self._at_work is None or not self._at_work[2].poll():
            return
        key, process, receiver = self._at_work
        try:
            self._last = key, receiver.recv()
        except EOFError:
            process.join()
            failed = f"computing {key[2]} ended with {process.exitcode}, as it does where memory is short"
            self._last = key, RunError(f"{failed}; try ling-probe analyze {key[0]} {key[2]}")
        self._at_work = None
        receiver.close()
        process.join()


@st.cache_resource
def desk() -> Desk:
    """The one of this server."""
    return Desk()


def wait_for(key: Key) -> Answer:
    """Wait for an answer and show so, giving way to whatever the reader does meanwhile.

    Raises:
        LingProbeError: Computing it failed.
    """
    start, shown = time.monotonic(), st.empty()
    while (answer := desk().ask(key)) is None:
        # Streamlit ends this run of the page here when there is something else to show.
        shown.caption(f"Computing over the whole run, once and for all views: {time.monotonic() - start:.0f} s")
        time.sleep(0.2)
    shown.empty()
    return answer
