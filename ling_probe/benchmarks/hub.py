"""Records by name: from the Hugging Face hub, and made by reasoning-gym. Both need a package that is not always there."""

import importlib
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from ling_probe.benchmarks.source import Source, digest_of, rows_of
from ling_probe.benchmarks.values import brief
from ling_probe.errors import BenchmarkError, UsageError

HUB, GYM = "hf:", "gym:"
_SIZE, _SEED = 100, 0


def hub_source(name: str, split: str) -> Source:
    """``hf:OWNER/DATASET[:CONFIG[:SPLIT]]``, read through the ``datasets`` package.

    Raises:
        UsageError: The name is written in another way.
        BenchmarkError: The package is not installed, or cannot give that dataset.
    """
    dataset, config, own_split = [*name.removeprefix(HUB).split(":"), "", ""][:3]
    if not dataset or name.count(":") > 3:
        raise UsageError(f"{brief(name)} names no dataset; hf:OWNER/DATASET is expected, with :CONFIG and :SPLIT if wanted")
    split = own_split or split
    library = _library("datasets", "load_dataset", "hub", "Hugging Face datasets")
    try:
        values = [_plain(row) for row in library.load_dataset(dataset, config or None, split=split)]
    except Exception as error:
        # What the library raises without a network or a dataset has no common class.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BenchmarkError(f"{name} (split {split}) cannot be read from the hub: {reason}") from error
    stem = dataset.rpartition("/")[2]
    return Source(name, dataset, split, stem, digest_of(values), partial(rows_of, name, values, word="row"))


def gym_source(name: str) -> Source:
    """``gym:TASK[:size=N][:seed=N]``, made by the ``reasoning_gym`` package: 100 problems of seed 0 unless told otherwise.

    Raises:
        UsageError: The name is written in another way.
        BenchmarkError: The package is not installed, or has no such task.
    """
    task, *options = name.removeprefix(GYM).split(":")
    numbers = _numbers(name, options)
    library = _library("reasoning_gym", "create_dataset", "gym", "reasoning-gym")
    try:
        values = [_plain(entry) for entry in library.create_dataset(task, **numbers)]
    except Exception as error:
        # Every task checks its own settings in its own way.
        raise BenchmarkError(f"{name} cannot be made by reasoning-gym: {error}") from error
    # The package's generators may change between its versions: the digest is of what they made.
    stem = f"{task}-{numbers['seed']}"
    return Source(name, task, "", stem, digest_of(values), partial(rows_of, name, values, word="problem"), "reasoning-gym")


def _numbers(name: str, options: Iterable[str]) -> dict[str, int]:
    found = {"size": _SIZE, "seed": _SEED}
    for option in options:
        key, _, value = option.partition("=")
        if key not in found or not value.isdecimal():
            raise UsageError(f"{brief(name)} has the part {brief(option)}; size=N and seed=N can follow the task")
        found[key] = int(value)
    return found


def _library(module: str, function: str, extra: str, title: str) -> Any:
    """A package that is not always there, by what it must offer: a folder may have its name."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = None
    if not hasattr(found, function):
        raise BenchmarkError(f"{title} is not installed; install it with: pip install 'ling-probe[{extra}]'")
    return found


def _plain(row: Any) -> Any:
    """A row as JSON would bring it back; what JSON has no word for is written out."""
    return json.loads(json.dumps(row, default=str))
