"""Shards into the one run that a single machine would have written.

1. Check from the manifests that these are all the shards of one run, each once, and complete.
2. Check that each file is what was written, and that every sequence is there once.
3. Make the run under a temporary name: the parts in order, as further names of the same bytes where the file system can, and
   a manifest.
4. Give it its name.

Whatever fails, the shards are as they were and there is no merged run.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ling_probe.errors import RunError, UsageError
from ling_probe.run.folder import new_folder, sync_folder
from ling_probe.run.manifest import Manifest, Part, write_manifest
from ling_probe.run.store import Run
from ling_probe.run.tables import file_digest

_OF_MACHINES = ("device", "verification")
"""What a manifest says of a model that may differ from machine to machine."""


def find_shards(folder: Path) -> list[Path]:
    """The shards' run folders in a folder.

    Raises:
        UsageError: There are none.
    """
    if found := sorted(folder.glob("shard-*-of-*")):
        return found
    raise UsageError(f"{folder} holds no shards; name the folder that was given to capture --shard as --out")


def merge(out: Path, shards: Sequence[Path]) -> Run:
    """Join all shards of one run into a complete run; the shards stay.

    The files of its parts are the shards' own, in the order of the benchmark.

    Raises:
        RunError: ``out`` exists, or a shard is missing, there twice, not complete, damaged, or of another run.
        UsageError: No shards.
    """
    if out.exists():
        raise RunError(f"{out} exists already and is left as it is; name a new folder for the merged run")
    runs = [Run.open(folder) for folder in shards]
    if not runs:
        raise UsageError("name the shards to merge, or the folder that holds them with --from")
    _check_shards(runs)
    for run in runs[1:]:
        _check_same(runs[0], run)
    _check_parts(runs)
    for run in runs:
        run.verify()
    _check_sequences(runs)
    places = sorted(((part, run) for run in runs for part in run.manifest.parts), key=lambda place: int(place[0].name))
    with new_folder(out) as new:
        (new / "parts").mkdir()
        for part, run in places:
            _bring(run.folder / "parts" / part.name, new / "parts" / part.name, part.files)
        sync_folder(new / "parts")
        first = next((run for run in runs if run.manifest.files), runs[0])
        _bring(first.folder, new, first.manifest.files)
        manifest = _joined([run.manifest for run in runs], tuple(part for part, _ in places), first.manifest.files)
        write_manifest(new, replace(manifest, summary=summarise(Run(new, manifest))))
    return Run.open(out)


def summarise(run: Run) -> dict[str, Any]:
    """Sequences, judged and correct answers by family, for the manifest."""
    families: dict[str, Any] = {}
    for family, rows in run.sequences.groupby("family"):
        judged = rows["correct"].dropna()
        families[str(family)] = {"sequences": len(rows), "judged": len(judged), "correct": int(judged.sum())}
    return {"families": families}


def _check_shards(runs: Sequence[Run]) -> None:
    """Every shard there once, and complete."""
    holders: dict[int, Run] = {}
    for run in runs:
        if (shard := run.manifest.shard) is None:
            raise RunError(f"{run.folder} is no shard but a whole run; merge what capture --shard wrote")
        first = holders.setdefault(shard.index, run)
        if (known := runs[0].manifest.shard) and shard.of != known.of:
            raise RunError(
                f"{run.folder} is one of {shard.of} shards, {runs[0].folder} one of {known.of}; merge those of one run"
            )
        if first is not run:
            raise RunError(f"{first.folder} and {run.folder} are both shard {shard.index} of {shard.of}; name one of them")
        if "parts" not in run.manifest.options or "records" not in run.manifest.benchmark:
            raise RunError(
                f"{run.folder} does not say how many parts and records its run has; merge what capture --shard wrote"
            )
        if not run.is_complete:
            raise RunError(f"{run.folder} is not complete; repeat its capture with --resume, and merge then")
        of = shard.of
    if missing := [f"{index}/{of}" for index in range(1, of + 1) if index not in holders]:
        raise RunError(f"shard {', '.join(missing)} is missing beside {runs[0].folder}; capture or copy it, and merge then")


def _check_same(first: Run, other: Run) -> None:
    ours, theirs = _identity(first.manifest), _identity(other.manifest)
    if different := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
        raise RunError(
            f"{other.folder} and {first.folder} were captured with another {' and '.join(different)}; "
            "only shards of one run can be merged"
        )


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What all shards of a run have in common, by name."""
    spread: dict[str, Mapping[str, Any]] = {"spec": manifest.spec.to_dict(), "benchmark": manifest.benchmark}
    spread |= {"model": {name: value for name, value in manifest.model.items() if name not in _OF_MACHINES}}
    spread |= {"option": manifest.options}
    found = {f"{kind} {name}": value for kind, values in spread.items() for name, value in values.items()}
    return found | {"interventions": manifest.interventions, "seed": manifest.seed}


def _check_parts(runs: Sequence[Run]) -> None:
    """Every part of the run in the shard it belongs to, and no other."""
    count = int(runs[0].manifest.options["parts"])
    for run in runs:
        shard = run.manifest.shard
        assert shard is not None
        expected = [number for number in range(count) if shard.holds(number)]
        found = [int(part.name) for part in run.manifest.parts]
        if wrong := sorted(set(expected) ^ set(found)):
            problem = "lacks" if wrong[0] in expected else "should not have"
            raise RunError(f"{run.folder} {problem} part {wrong[0]:05d} of {count}; copy or capture this shard again")


def _check_sequences(runs: Sequence[Run]) -> None:
    holders: dict[str, Run] = {}
    for run in runs:
        for name in sorted(run.done):
            if (first := holders.setdefault(name, run)) is not run:
                raise RunError(f"{first.folder} and {run.folder} both hold sequence {name}; capture one of them again")
    listed = sum(part.sequences for run in runs for part in run.manifest.parts)
    expected = runs[0].manifest.benchmark["records"]
    if not len(holders) == listed == expected:
        raise RunError(
            f"the shards hold {len(holders)} sequences and list {listed}, the benchmark has {expected}; capture them again"
        )


def _bring(source: Path, target: Path, files: Mapping[str, str]) -> None:
    """A folder's files under a second name, or a compared copy of them on another file system."""
    target.mkdir(exist_ok=True)
    for name, digest in files.items():
        try:
            os.link(source / name, target / name)
        except OSError:
            _copy(source / name, target / name, digest)
    sync_folder(target)


def _copy(source: Path, target: Path, digest: str) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())
    if file_digest(target) != digest:
        raise RunError(f"{source} was copied and the copy differs; the disk or the network is not to be trusted, merge again")


def _joined(manifests: Sequence[Manifest], parts: tuple[Part, ...], files: Mapping[str, str]) -> Manifest:
    """The manifest of the whole run; where machines differed, it names all."""
    first = manifests[0]
    names = dict.fromkeys(name for manifest in manifests for name in manifest.versions)
    checks = [dict(manifest.model["verification"]) for manifest in manifests if manifest.model.get("verification")]
    worst = {"verification": max(checks, key=lambda check: check.get("max_weight_error", 0.0))} if checks else {}
    device = {"device": _listed(manifest.model["device"] for manifest in manifests)} if "device" in first.model else {}
    return replace(
        first,
        created=min(manifest.created for manifest in manifests),
        finished=max(str(manifest.finished) for manifest in manifests),
        model=dict(first.model) | device | worst,
        versions={name: _listed(manifest.versions.get(name, "none") for manifest in manifests) for name in names},
        shard=None,
        parts=parts,
        files=files,
    )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))
