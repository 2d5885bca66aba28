"""The run folder: created once, appended to part by part, resumed, and read by columns."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa

from ling_probe.activations import ActivationSpec
from ling_probe.errors import RunError, UsageError
from ling_probe.interventions import Intervention, check_all
from ling_probe.run.check import damaged_files, foreign_files, is_leftover
from ling_probe.run.folder import WriterLock, new_folder, sync_folder
from ling_probe.run.manifest import (
    NEW,
    REMEDY,
    VECTORS,
    Manifest,
    Part,
    encode,
    installed_versions,
    now,
    read_manifest,
    write_manifest,
)
from ling_probe.run.partition import Shard
from ling_probe.run.tables import (
    SEQUENCES,
    STEPS,
    TOKEN_COLUMNS,
    TokenBatch,
    read_batch,
    read_table,
    to_tables,
    write_table,
)
from ling_probe.run.vectors import ActivationBatch, read_vectors, write_vectors
from ling_probe.spec import ModelSpec
from ling_probe.trace import RoutingTrace


class Run:
    """A folder of traces and its manifest; made by `create` or `open`.

    Any number may read a run while one process writes it. Memory is one part's, whatever the size of the run, except that
    the manifest holds an entry a part, `done` an id a sequence, and `sequences` and `steps` a row for each.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._sequences: pd.DataFrame | None = None
        self._done: set[str] | None = None
        self._lock = WriterLock(folder)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        spec: ModelSpec,
        model: dict[str, Any],
        benchmark: dict[str, Any],
        options: dict[str, Any],
        interventions: Sequence[Intervention] = (),
        seed: int = 0,
        shard: Shard | None = None,
    ) -> Self:
        """An empty open run in a new folder.

        Raises:
            RunError: The folder exists; nothing in it is touched.
            InterventionError: The model cannot carry out an intervention.
            UsageError: A value cannot be written as JSON.
        """
        folder = Path(folder)
        check_all(interventions, spec)
        manifest = Manifest(
            created=now(),
            spec=spec,
            model=model,
            benchmark=benchmark,
            options=options,
            interventions=tuple(interventions),
            seed=seed,
            versions=installed_versions(),
            shard=shard,
        )
        encode(manifest)
        with new_folder(folder) as new:
            (new / "parts").mkdir()
            write_manifest(new, manifest)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, *, whole: bool = True) -> Self:
        """A run that was created before, to read or, while it is not complete, to go on with.

        Args:
            folder: The run folder.
            whole: Refuse a run that lacks a file; what lacks one can only be mended, by `drop_damaged`.

        Raises:
            RunError: It is no run folder, or run.json is damaged, foreign or too new, or a part is missing.
        """
        return cls(Path(folder), read_manifest(Path(folder), whole=whole))

    @property
    def spec(self) -> ModelSpec:
        """Geometry of the model that was run."""
        return self.manifest.spec

    @property
    def kept_activations(self) -> ActivationSpec | None:
        """Which vectors were kept, if any."""
        values = self.manifest.options.get("activations")
        return ActivationSpec.from_dict(values) if values else None

    @property
    def is_complete(self) -> bool:
        """Whether `finish` was called."""
        return self.manifest.state == "complete"

    @property
    def done(self) -> AbstractSet[str]:
        """Ids of the sequences held; resuming skips them."""
        if self._done is None:
            self._done = set(self._rows("sequences.parquet", SEQUENCES, ["sequence_id"])["sequence_id"].to_pylist())
        return self._done

    @property
    def sequences(self) -> pd.DataFrame:
        """One row a sequence, 0 to S-1, with the columns of sequences.parquet; `meta` is JSON text."""
        if self._sequences is None:
            table = self._rows("sequences.parquet", SEQUENCES).to_pandas()
            self._sequences = table.astype({"correct": "boolean"})
        return self._sequences

    @property
    def steps(self) -> pd.DataFrame:
        """One row a step: sequence (row in `sequences`), step, label, text, start and stop (positions), correct."""
        table = self._rows("steps.parquet", STEPS).to_pandas().astype({"correct": "boolean"})
        table.insert(0, "sequence", self._ids().get_indexer(table.pop("sequence_id")).astype("int32"))
        return table

    def writing(self) -> AbstractContextManager[None]:
        """Keep every other writer away while the block runs; `append` and `finish` do so for themselves.

        Raises:
            RunError: Another process is writing this run.
        """
        return self._lock.held()

    def append(self, traces: Sequence[RoutingTrace], *, number: int | None = None) -> None:
        """Add one part: it is there whole, or not at all.

        Args:
            traces: What it holds.
            number: The part's number in the whole run, which orders the parts; the next one if left out.

        Raises:
            RunError: The run is complete, is or was changed by another process, has the part or one of the sequences already,
                or the disk takes no more; the parts before are as they were.
            UsageError: No traces, or some of another spec or with other extras than the run's.
        """
        with self.writing():
            self._check_writable()
            self._check_traces(traces)
            self._clear_leftovers()
            name = f"{self._next_number() if number is None else number:05d}"
            if name in {part.name for part in self.manifest.parts}:
                raise RunError(f"{self.folder} has part {name} already; skip the parts that its manifest lists")
            tables = to_tables(traces, self.spec)
            rows = {file.removesuffix(".parquet"): table.num_rows for file, table in tables.items()}
            with self._cleared_on_failure(f"part {name}"):
                files = self._write_part(name, tables, traces)
                part = Part(name=name, **rows, extras=tuple(sorted(traces[0].extras)), files=files)
                parts = sorted((*self.manifest.parts, part), key=lambda each: int(each.name))
                self._replace(replace(self.manifest, parts=tuple(parts)))
            if self._done is not None:
                self._done.update(trace.sequence_id for trace in traces)

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Mark the run complete; nothing can be appended after.

        Raises:
            RunError: It is complete already, is or was changed by another process, or the disk takes no more.
        """
        with self.writing():
            self._check_writable()
            self._clear_leftovers()
            with self._cleared_on_failure("run.json"):
                self._replace(replace(self.manifest, state="complete", finished=now(), summary=summary))

    def verify(self) -> list[str]:
        """Compare every file with its recorded digest, reading the whole run; gives what lies under ``parts`` and is not of it.

        Raises:
            RunError: A file is missing or not what was written.
        """
        if damaged := [each for part in self.manifest.parts for each in damaged_files(self.folder, part)]:
            more = f", nor are {len(damaged) - 1} more files" if len(damaged) > 1 else ""
            raise RunError(f"{self.folder}: {damaged[0]}{more}; {REMEDY}")
        return foreign_files(self.folder, self.manifest)

    def drop_damaged(self) -> list[str]:
        """Take parts with a missing or changed file out of the run, to be captured again; says what was wrong.

        A complete run that loses one is open again. Reads the whole run.

        Raises:
            RunError: It is or was changed by another process.
        """
        with self.writing():
            self._check_unchanged()
            damaged = {part.name: damaged_files(self.folder, part) for part in self.manifest.parts}
            kept = tuple(part for part in self.manifest.parts if not damaged[part.name])
            if len(kept) < len(self.manifest.parts):
                self._replace(replace(self.manifest, parts=kept, state="open", finished=None, summary=None))
                self._done = None
            return [each for found in damaged.values() for each in found]

    def batches(
        self,
        *,
        layers: Sequence[int] | None = None,
        weights: bool = False,
        columns: Sequence[str] = (),
        parts: Sequence[int] | None = None,
    ) -> Iterator[TokenBatch]:
        """The tokens, one part at a time; only what is asked for is read.

        Args:
            layers: Decoder layers, in the order wanted; None is all that are routed.
            weights: Whether to read the weights of the chosen too.
            columns: "token", "loss", "sequence_id", or extras that the run kept, such as "logits"; "residual" comes for every
                decoder layer, dense ones too.
            parts: Places in `manifest.parts`, in the order wanted; None is all.

        Raises:
            UsageError: A layer has no router, or the run has no such column.
            RunError: A file is damaged.
        """
        chosen = self.spec.routed_layers if layers is None else tuple(layers)
        for layer in chosen:
            self.spec.row(layer)
        extras = self.manifest.parts[0].extras if self.manifest.parts else ()
        if self.manifest.parts and (unknown := set(columns) - {*TOKEN_COLUMNS, *extras}):
            found = ", ".join([*TOKEN_COLUMNS, *extras])
            raise UsageError(f"{self.folder} has no column {', '.join(sorted(unknown))}; it has {found}")
        every = self.manifest.parts if parts is None else [self.manifest.parts[place] for place in parts]
        return self._read_batches(every, chosen, weights=weights, columns=columns)

    def _read_batches(
        self, parts: Sequence[Part], layers: Sequence[int], *, weights: bool, columns: Sequence[str]
    ) -> Iterator[TokenBatch]:
        ids = self._ids()
        for part in parts:
            path = self.folder / "parts" / part.name / "tokens.parquet"
            yield read_batch(path, self.spec, ids, layers=layers, weights=weights, columns=columns)

    def activations(self, name: str) -> Iterator[ActivationBatch]:
        """The vectors of one site, such as "residual:3", some of a part at a time, each with its sequence and position.

        Raises:
            UsageError: The run did not keep it.
            RunError: A file is damaged.
        """
        kept = self.kept_activations
        if kept is None or name not in kept.names:
            raise UsageError(
                f"{self.folder} has no activation {name}; it has {kept or 'none'}: capture with --activations {name}"
            )
        return self._read_activations(name)

    def _read_activations(self, name: str) -> Iterator[ActivationBatch]:
        first = 0
        for part in self.manifest.parts:
            yield from read_vectors(self.folder / "parts" / part.name / VECTORS, name, first)
            first += part.sequences

    def _ids(self) -> pd.Index:
        return pd.Index(self.sequences["sequence_id"])

    def _rows(self, file: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
        names = columns or schema.names
        tables = [read_table(self.folder / "parts" / part.name / file, names) for part in self.manifest.parts]
        return pa.concat_tables([schema.empty_table().select(names), *tables])

    def _check_unchanged(self) -> None:
        if read_manifest(self.folder, whole=False) != self.manifest:
            raise RunError(f"{self.folder} was changed by another process since it was opened; let one process write it")

    def _check_writable(self) -> None:
        self._check_unchanged()
        if self.is_complete:
            raise RunError(f"{self.folder} is complete and cannot be added to; create a new run")

    def _next_number(self) -> int:
        return max((int(part.name) for part in self.manifest.parts), default=-1) + 1

    def _check_traces(self, traces: Sequence[RoutingTrace]) -> None:
        if not traces:
            raise UsageError(f"no traces to append to {self.folder}; a part holds one at least")
        extras = self.manifest.parts[0].extras if self.manifest.parts else sorted(traces[0].extras)
        for trace in traces:
            if names := [name for name, value in vars(self.spec).items() if value != getattr(trace.spec, name)]:
                raise UsageError(
                    f"sequence {trace.sequence_id} is not of {self.spec.name}, the model of {self.folder}: "
                    f"the specs differ in {', '.join(names)}"
                )
            if sorted(trace.extras) != list(extras):
                found, expected = (", ".join(sorted(names)) or "none" for names in (trace.extras, extras))
                raise UsageError(f"sequence {trace.sequence_id} has extras {found}; every one of {self.folder} has {expected}")
        wanted = set(self.kept_activations.names if self.kept_activations else ())
        if wrong := [trace for trace in traces if set(trace.activations) != wanted]:
            found, expected = (", ".join(sorted(names)) or "none" for names in (wrong[0].activations, wanted))
            raise UsageError(
                f"sequence {wrong[0].sequence_id} has activations {found}; every one of {self.folder} has {expected}"
            )
        counts = Counter(trace.sequence_id for trace in traces)
        if repeated := [name for name, count in counts.items() if count > 1 or name in self.done]:
            raise RunError(f"{self.folder} has sequence {repeated[0]} already; skip what `done` lists")

    def _write_part(self, name: str, tables: dict[str, pa.Table], traces: Sequence[RoutingTrace]) -> dict[str, str]:
        parts = self.folder / "parts"
        new = parts / f"{name}.new"
        new.mkdir()
        files = {file: write_table(table, new / file) for file, table in tables.items()}
        if self.kept_activations:
            files[VECTORS] = write_vectors(traces, self.spec.d_model, new / VECTORS)
        sync_folder(new)
        new.rename(parts / name)
        sync_folder(parts)
        return files

    def _clear_leftovers(self) -> None:
        """Remove what an interrupted `append` left: parts that run.json does not list."""
        listed = {part.name for part in self.manifest.parts}
        for folder in (self.folder / "parts").iterdir():
            if is_leftover(folder.name) and folder.name not in listed:
                shutil.rmtree(folder)

    @contextmanager
    def _cleared_on_failure(self, what: str) -> Iterator[None]:
        """Give back the room that a failed write took, and say in one line what failed."""
        try:
            yield
        except OSError as error:
            with suppress(OSError, RunError):
                (self.folder / NEW).unlink(missing_ok=True)
                if read_manifest(self.folder, whole=False) == self.manifest:
                    self._clear_leftovers()
            held = sum(part.sequences for part in self.manifest.parts)
            raise RunError(
                f"{self.folder}: {what} could not be written ({error.strerror or error}); the {held} sequences written before "
                "are whole: make room, and go on with --resume"
            ) from error

    def _replace(self, manifest: Manifest) -> None:
        write_manifest(self.folder, manifest)
        self.manifest, self._sequences = manifest, None
