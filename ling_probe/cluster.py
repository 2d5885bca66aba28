"""One run by many machines at once: Ray actors capture its shards, and the shards are merged.

Each actor loads the model once and writes shards to a folder that all machines must share. Ray starts an actor that was killed
again and gives it the shard anew; the shard goes on behind its last whole part, as with ``--resume``, so nothing is held twice.
Ray is no dependency of the package: ``pip install 'ling-probe[ray]'`` brings it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ling_probe.errors import LingProbeError, RunError, UsageError
from ling_probe.run import Run, Shard, merge


def capture_with_ray(
    out: Path,
    *,
    actors: int,
    model: Mapping[str, Any],
    benchmark: Mapping[str, Any],
    options: Mapping[str, Any],
    resume: bool = False,
) -> Run:
    """Capture a benchmark with Ray actors, a shard each, and merge; the shards stay in ``OUT.shards``.

    Args:
        out: The merged run's folder.
        actors: How many; each has one GPU where the cluster has any and the device is not the CPU.
        model: Arguments of `load_native`.
        benchmark: Arguments of `read_benchmark`.
        options: Further arguments of `record`.
        resume: Go on with the shards of an interrupted run.

    Raises:
        UsageError: Ray is not installed.
        RunError: ``out`` exists, its shards do and ``resume`` is false, or a shard failed; the message is the shard's.
    """
    ray = _ray()
    shards = out.absolute().parent / f"{out.name}.shards"
    for folder in (out, *(() if resume else (shards,))):
        if folder.exists():
            raise RunError(
                f"{folder} exists already and is left as it is; give --out a new folder, or --resume an interrupted run"
            )
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 1 if model.get("device") != "cpu" and ray.cluster_resources().get("GPU", 0) else 0
    work = ray.data.from_items([{"index": index} for index in range(1, actors + 1)], override_num_blocks=actors)
    told = work.map(
        _Writer,
        fn_constructor_args=(shards, actors, _absolute(model), _absolute(benchmark), dict(options)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
    ).take_all()
    if errors := [f"shard {row['index']}/{actors}: {row['error']}" for row in told if row["error"]]:
        raise RunError(errors[0])
    return merge(out, [shards / Shard(index, actors).folder for index in range(1, actors + 1)])


class _Writer:
    """One actor: a loaded model that captures the shards it is given."""

    def __init__(
        self, folder: Path, of: int, model: dict[str, Any], benchmark: dict[str, Any], options: dict[str, Any]
    ) -> None:
        from ling_probe.benchmarks import read_benchmark
        from ling_probe.model.load import load_native

        self._folder, self._of, self._options, self._error = folder, of, options, ""
        try:
            self._benchmark, self._loaded = read_benchmark(**benchmark), load_native(**model)
        except LingProbeError as error:
            self._error = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Capture one shard; an error of ours is told in a word, for Ray would try it again and wrap it."""
        from ling_probe.recording import record

        shard = Shard(int(row["index"]), self._of)
        error = self._error
        if not error:
            try:
                record(self._loaded, self._benchmark, self._folder / shard.folder, shard=shard, resume=True, **self._options)
            except LingProbeError as found:
                error = str(found)
        return {"index": shard.index, "error": error}


def _absolute(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a local file's whole path: an actor does not work in our folder."""
    name, at, snapshot = str(arguments["name_or_path"]).partition("@")
    here = str(Path(name).resolve()) if Path(name).exists() else name
    return dict(arguments) | {"name_or_path": f"{here}{at}{snapshot}"}


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"Ray is not installed ({error}); install it with: pip install 'ling-probe[ray]'") from error
    return ray
