"""Is every file of a run what was written, and is there anything else."""

import re
from pathlib import Path

from ling_probe.run.manifest import Manifest, Part
from ling_probe.run.tables import file_digest


def damaged_files(folder: Path, part: Part) -> list[str]:
    """What is wrong with a part's files, in words, by comparing each with its recorded digest."""
    found = []
    for name, digest in sorted(part.files.items()):
        path = folder / "parts" / part.name / name
        if not path.is_file():
            found.append(f"{name} of part {part.name} is missing")
        elif file_digest(path) != digest:
            found.append(f"{name} of part {part.name} is not what was written")
    return found


def damaged_beside(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the files beside ``parts`` that are missing or not what was written."""
    return [
        name
        for name, digest in sorted(manifest.files.items())
        if not (folder / name).is_file() or file_digest(folder / name) != digest
    ]


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files and folders under ``parts`` that run.json does not list, by their path in the run.

    What an interrupted `Run.append` left is none while the run is open: the next one clears it away. Reports and notes beside
    ``parts`` are nobody's business.
    """
    listed = {part.name: set(part.files) for part in manifest.parts}
    found = []
    for path in sorted((folder / "parts").iterdir()):
        if path.name in listed:
            found += [each for each in sorted(path.iterdir()) if each.name not in listed[path.name]]
        elif manifest.state == "complete" or not is_leftover(path.name):
            found.append(path)
    return [path.relative_to(folder).as_posix() for path in found]


def is_leftover(name: str) -> bool:
    """Whether a folder that run.json does not list is named like a part, whole or half written."""
    return re.fullmatch(r"\d{5,}(\.new)?", name) is not None
