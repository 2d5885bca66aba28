"""Folders that are there whole or not at all, and the lock of the one process that writes to a run.

The lock is the operating system's: the kernel lets go of it when the process ends, however it ends, so a crash leaves nothing
to clear away by hand. It holds between processes of one machine, and between machines where the file system carries locks;
where it does not, machines are kept apart by giving each a folder of its own.
"""

import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ling_probe.errors import RunError

CAUSAL_EFFECTS = Path("causal", "effects.parquet")
"""Table of a causal study in the folder of the run that its experts were picked in."""
REROUTED = Path("causal", "rerouting.parquet")
"""Table of losses under other routers, in the folder of the run whose model was changed."""
STEERING = Path("steering")
"""Folder of the steering vectors made of a run, one folder each, with the table of what it does."""
STEERING_EFFECTS = "effects.parquet"
LOCK = "run.lock"
"""File in a run folder that is locked while a process writes; it goes when the writer is done."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows has no way to ask for it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name beside its own, which it is given once the block has ended well.

    A process that is killed leaves at most a hidden ``.NAME.*.new`` beside it, never half a folder under the name.

    Raises:
        RunError: The name is taken; what has it is not touched.
    """
    _check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.new"
    new.mkdir()
    try:
        yield new
        sync_folder(new)
        _check_free(folder)
        new.rename(folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = error.strerror or error
        raise RunError(f"{folder} could not be made ({reason}), and nothing is left of it; make room, and try again") from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        sync_folder(folder.parent)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"{folder} is whole, but the disk would not make its name last ({reason}); look whether it stays"
        ) from error


def _check_free(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise RunError(f"{folder} exists already and is left as it is; name a new folder, or open this one to go on")


class WriterLock:
    """Lets one process at a time write to a run folder; may be held several times over by its owner."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._times = 0
        self._guard = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the block runs.

        Raises:
            RunError: Another writer holds it; the message names its process and machine.
        """
        with self._guard:
            if not self._times:
                self._file = self._acquire()
            self._times += 1
        try:
            yield
        finally:
            with self._guard:
                self._times -= 1
                if not self._times:
                    self._release()

    def _acquire(self) -> IO[bytes]:
        path = self._folder / LOCK
        while True:
            # Appending leaves the words of a present owner in place.
            file = path.open("ab+")
            if not _lock(file):
                who = _words(file)
                file.close()
                raise RunError(
                    f"{self._folder} is being written by {who}; let it end, or stop it, and then go on with --resume"
                )
            # The owner before may have removed the file between our opening and locking it.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file.close()
        with suppress(OSError):  # a full disk: the lock holds without its words
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        return file

    def _release(self) -> None:
        file, self._file = self._file, None
        assert file is not None
        with suppress(OSError):  # Windows keeps an open file's name until it is closed
            (self._folder / LOCK).unlink()
        with suppress(OSError):
            file.close()
        if sys.platform == "win32":
            with suppress(OSError):
                (self._folder / LOCK).unlink()


def _words(file: IO[bytes]) -> str:
    with suppress(OSError):
        file.seek(0)
        return file.read(200).decode(errors="replace") or "another process"
    return "another process"


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is ours; so it counts where the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        try:
            # Far behind the words, which others may then still read.
            file.seek(1 << 20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
