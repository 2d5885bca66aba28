"""The samples of an Inspect ``.eval`` log: JSON members of a zip, read in memory within limits, never extracted."""

import importlib
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ling_probe.benchmarks.source import Row, load_object
from ling_probe.benchmarks.values import brief
from ling_probe.errors import BenchmarkError

MEMBER_BYTES = 64 * 2**20
"""A sample that unpacks to more is not read."""
TOTAL_BYTES = 4 * 2**30
"""A log that unpacks to more is not read."""
_HEADER = "header.json"
_ZSTD = getattr(zipfile, "ZIP_ZSTANDARD", None)
"""The method's number from Python 3.14 on."""
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, *([] if _ZSTD is None else [_ZSTD])}
_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, NotImplementedError,
    *([] if _ZSTD is None else [importlib.import_module("compression.zstd").ZstdError]),
)  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """What was evaluated; empty where the log does not say.

    Raises:
        BenchmarkError: The file is no zip, is damaged, or unpacks to more than is read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if (total := sum(info.file_size for info in file.infolist())) > TOTAL_BYTES:
                raise BenchmarkError(f"{path} unpacks to {total:,} bytes; at most {TOTAL_BYTES:,} are read")
            named = _HEADER in file.namelist()
            return _load(file, file.getinfo(_HEADER), f"{path} member {brief(_HEADER)}") if named else {}
    except _DAMAGE as error:
        raise BenchmarkError(f"{path} is no Inspect log that can be read ({error}); a zip of JSON is expected") from error


def read_samples(path: Path) -> Iterator[Row]:
    """The samples in the order of their names; each is unpacked when it is loaded, while the iteration goes on."""
    with zipfile.ZipFile(path) as file:
        members = (info for info in file.infolist() if info.filename.startswith("samples/") and info.filename.endswith(".json"))
        for number, info in enumerate(sorted(members, key=lambda info: info.filename), start=1):
            where = f"{path} member {brief(info.filename)}"
            yield Row(where, number, partial(_load, file, info, where))


def _load(file: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> dict[str, Any]:
    if info.compress_type not in _METHODS:
        name = "zstd" if info.compress_type == 93 else f"method {info.compress_type}"
        raise BenchmarkError(
            f"{where} is packed with {name}, which this Python cannot unpack; convert the log: inspect log convert --to json"
        )
    if info.file_size > MEMBER_BYTES:
        raise BenchmarkError(f"{where} unpacks to {info.file_size:,} bytes; at most {MEMBER_BYTES:,} are read")
    try:
        with file.open(info) as member:
            # Asked for this much, zipfile unpacks no more, whatever the packed bytes would become; read() would.
            payload = member.read(info.file_size)
    except _DAMAGE as error:
        raise BenchmarkError(f"{where} is damaged ({error}); copy the log again") from error
    return load_object(where, payload)
