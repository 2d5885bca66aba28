"""Conditions that were carried out, kept one a line, so that a study goes on where it was interrupted."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from ling_probe.errors import RunError

Arrays = dict[str, dict[str, Float64[np.ndarray, " P"]]]
"""What one condition gave, by part and name."""


class Kept:
    """A file of conditions; a line cut short by a crash is done again."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Read what is there.

        Raises:
            RunError: The file holds the conditions of another study.
        """
        self._path = path
        self._done: dict[str, Arrays] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        whole = [json.loads(line) for line in lines[:-1]]
        if whole and whole[0] != dict(identity):
            different = ", ".join(name for name in identity if whole[0].get(name) != identity[name])
            raise RunError(f"{path.parent} holds a study with another {different}; name a new folder with --out")
        for line in whole[1:]:
            key = line.pop("key")
            self._done[key] = {part: {name: np.array(each) for name, each in values.items()} for part, values in line.items()}
        text = "".join(f"{line}\n" for line in lines[:-1]) or json.dumps(dict(identity)) + "\n"
        path.write_text(text, encoding="utf-8")

    @property
    def done(self) -> int:
        """How many are kept."""
        return len(self._done)

    def arrays(self, key: str, measured: Callable[[], Arrays]) -> Arrays:
        """What is kept under a key, or what is measured now and then kept."""
        if key not in self._done:
            found = measured()
            line = {part: {name: each.tolist() for name, each in values.items()} for part, values in found.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key} | line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._done[key] = found
        return self._done[key]
