"""What run.json says: read, checked, and written so that a reader finds the old one or the new one, never half of one."""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from ling_probe.errors import LingProbeError, RunError, UsageError
from ling_probe.interventions import Intervention
from ling_probe.run.folder import sync_folder
from ling_probe.run.partition import Shard
from ling_probe.spec import ModelSpec

SCHEMA = 1
"""Version of the folder's layout that this package writes, and the newest it reads."""

NEW = "run.json.new"
"""The next run.json until it is whole."""
FILES = ("sequences.parquet", "steps.parquet", "tokens.parquet")
"""Of every part."""
VECTORS = "activations.safetensors"
"""Of every part of a run that keeps activations."""
REMEDY = "copy the whole folder again, or repeat its capture with --redo-damaged"
"""What to do about a damaged part."""
_PACKAGES = ("ling-probe", "numpy", "pyarrow", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder under ``parts``, written whole."""

    name: str
    sequences: int
    steps: int
    tokens: int
    """Rows of its files."""
    extras: tuple[str, ...]
    """What was kept beside the choice, by name, ascending; the same in every part of a run."""
    files: Mapping[str, str]
    """sha256 by file name."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{5,}", self.name) or set(self.files) - {VECTORS} != set(FILES):
            raise ValueError(f"part {self.name!r} with files {sorted(self.files)}; expected five digits and {sorted(FILES)}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was run on what. Mirrors run.json."""

    schema: int = SCHEMA
    created: str
    """UTC, ISO 8601."""
    finished: str | None = None
    """UTC, ISO 8601; None while open."""
    state: Literal["open", "complete"] = "open"
    spec: ModelSpec
    model: Mapping[str, Any]
    """Name, weight and tokenizer digests, dtype, how its routing was verified."""
    benchmark: Mapping[str, Any]
    options: Mapping[str, Any]
    interventions: tuple[Intervention, ...] = ()
    seed: int = 0
    versions: Mapping[str, str]
    """Of Python and the packages that touched the numbers."""
    shard: Shard | None = None
    """Which share of the run this is; None is all of it."""
    parts: tuple[Part, ...] = ()
    """Ascending by name; the name is the part's number in the whole run."""
    summary: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of run.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "spec": self.spec.to_dict(),
            "interventions": [each.to_dict() for each in self.interventions],
            "shard": asdict(self.shard) if self.shard else None,
            "parts": [asdict(part) | {"extras": list(part.extras)} for part in self.parts],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The manifest that `to_dict` wrote; what cannot be one raises as its pieces do."""
        parts = [Part(**(part | {"extras": tuple(part["extras"])})) for part in values["parts"]]
        pieces = {
            "spec": ModelSpec.from_dict(values["spec"]),
            "interventions": tuple(map(Intervention.from_dict, values["interventions"])),
            "shard": Shard(**values["shard"]) if values.get("shard") else None,
            "parts": tuple(parts),
        }
        return cls(**(dict(values) | pieces))


def read_manifest(folder: Path, *, whole: bool = True) -> Manifest:
    """The manifest of a run folder.

    Args:
        folder: The run folder.
        whole: Whether every file that run.json lists must be there.

    Raises:
        RunError: The folder, its run.json or a part is missing, or run.json is damaged, foreign or too new.
    """
    manifest = _parsed(folder, _values(folder))
    for part in manifest.parts if whole else ():
        for name in part.files:
            if not (folder / "parts" / part.name / name).is_file():
                raise RunError(f"{folder}: part {part.name} lacks {name}, which run.json lists; {REMEDY}")
    return manifest


def encode(manifest: Manifest) -> str:
    """The text of run.json.

    Raises:
        UsageError: Something in it is no plain JSON value.
    """
    try:
        return json.dumps(manifest.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"run.json holds plain finite JSON values only: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace run.json in one step that survives a power cut."""
    text, new = encode(manifest), folder / NEW
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / "run.json")
    sync_folder(folder)


def now() -> str:
    """UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions() -> dict[str, str]:
    """Python and the installed packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _values(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        problem = "has no run.json" if folder.is_dir() else "is no folder"
        raise RunError(f"{folder} {problem}; name the folder of a run, the one that holds run.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); it is damaged: copy the run again, or capture it again") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if type(schema) is not int or schema < 1:
        raise RunError(f"{path} is not the manifest of a run: no schema number; name a folder that ling-probe captured")
    if schema > SCHEMA:
        raise RunError(f"{path} has schema {schema}, and this ling-probe reads up to schema {SCHEMA}; install a newer one")
    return values


def _parsed(folder: Path, values: dict[str, Any]) -> Manifest:
    values = {"shard": None} | values
    known = {field.name for field in fields(Manifest)}
    if missing := sorted(known - set(values)):
        raise RunError(f"{folder / 'run.json'} lacks {', '.join(missing)}; it is damaged or not the manifest of a run")
    try:
        manifest = Manifest.from_dict({name: values[name] for name in known})
    except (LingProbeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / 'run.json'} is not the manifest of a run ({error}); copy the run again") from error
    if manifest.state not in ("open", "complete"):
        raise RunError(f"{folder / 'run.json'} has state {manifest.state!r}; expected open or complete")
    return manifest
