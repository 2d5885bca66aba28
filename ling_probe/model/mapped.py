"""A checkpoint's tensors through a memory map: nothing is read before it is used, and nothing read has to stay in memory.

Files are mapped read-only. A private writable map would be charged to the machine's memory as a whole, and a file larger than
memory refused.
"""

import mmap
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from ling_probe.model.files import ITEM_BYTES, Checkpoint, Stored
from ling_probe.model.fp8 import SCALE, dequantise

_DTYPES = dict(zip(ITEM_BYTES, (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn), strict=True))
_BLOCK_BYTES = 4 << 20
Range = tuple[Path, int, int]
"""A file, and the first and past-the-last byte of a piece of it."""


class MappedTensors:
    """Tensors of a checkpoint by original name, as views of its mapped files or as numbers of another type."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stored = checkpoint.stored
        self._block = checkpoint.block
        self._maps = {file: _map(file) for file in checkpoint.files}

    def view(self, name: str) -> torch.Tensor:
        """The stored entries, not to be written to; of a quantised tensor, the entries before scaling."""
        stored = self._stored[name]
        dtype, count = _DTYPES[stored.dtype], (stored.stop - stored.start) // ITEM_BYTES[stored.dtype]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(self._maps[stored.file], dtype=dtype, count=count, offset=stored.start)
        return flat.view(stored.shape)

    def numbers(self, name: str) -> torch.Tensor:
        """What the tensor says: a view where that is what is stored, and the dequantised matrix in float32 where it is fp8."""
        if self._stored[name].dtype != "F8_E4M3":
            return self.view(name)
        assert self._block is not None, "checked when the checkpoint was found"
        return dequantise(self.view(name), self.view(name + SCALE), self._block)

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in a number type: a view if it is stored so."""
        return self.numbers(name).to(dtype)

    def ranges(self, prefixes: Iterable[str]) -> list[Range]:
        """The bytes of every tensor whose name begins so, in the order they lie, neighbours joined."""
        begins = tuple(prefixes)
        return list(_joined(sorted((each for name, each in self._stored.items() if name.startswith(begins)), key=_place)))


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _place(stored: Stored) -> tuple[Path, int]:
    return stored.file, stored.start


def _joined(pieces: Iterable[Stored]) -> Iterator[Range]:
    last: Range | None = None
    for each in pieces:
        if last is not None and last[0] == each.file and last[2] == each.start:
            last = (last[0], last[1], each.stop)
            continue
        if last is not None:
            yield last
        last = (each.file, each.start, each.stop)
    if last is not None:
        yield last


class ReadAhead:
    """Reads pieces of files in another thread, so that the system has them in its cache by the time they are used."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._stop = threading.Event()

    @classmethod
    @contextmanager
    def running(cls) -> "Iterator[ReadAhead]":
        """One for the length of the block; leaving it stops a read under way."""
        with ThreadPoolExecutor(1, "read-ahead") as pool:
            ahead = cls(pool)
            try:
                yield ahead
            finally:
                ahead._stop.set()

    def start(self, ranges: Iterable[Range]) -> "Future[None]":
        """Begin to read; the result is there when everything was read."""
        return self._pool.submit(self._read, list(ranges))

    def _read(self, ranges: list[Range]) -> None:
        scratch = memoryview(bytearray(_BLOCK_BYTES))
        for file, start, stop in ranges:
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                while start < stop and not self._stop.is_set():
                    read = stream.readinto(scratch[: min(_BLOCK_BYTES, stop - start)])
                    if not read:
                        return
                    start += read
