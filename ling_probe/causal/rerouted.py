"""Losses of a run's model under other routers, kept in the run's folder."""

from collections.abc import Callable, Sequence

import pandas as pd

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.model.load import LoadedLing
from ling_probe.rerouting import FURTHER, rerouted_losses
from ling_probe.run import Run
from ling_probe.run.folder import REROUTED


def check_model(run: Run, loaded: LoadedLing) -> None:
    """Refuse a model that is not the run's.

    Raises:
        UsageError: Its weights are others.
    """
    if loaded.digest != run.manifest.model.get("digest"):
        raise UsageError(f"{loaded.spec.name} has other weights than the model of {run.folder}; name that model with --model")


def keep_rerouting(
    run: Run,
    loaded: LoadedLing,
    records: Sequence[Record],
    *,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> pd.DataFrame:
    """Read solutions without the bias, without groups, without single experts and with other K; write the table and give it.

    The run itself is not changed: the table lies in its folder, and says the model's `digest`.

    Raises:
        UsageError: The model is not the run's, or no record has a solution.
    """
    check_model(run, loaded)
    kinds = ("no-bias", "k", *FURTHER)
    table = rerouted_losses(loaded, records, kinds=kinds, batch_tokens=batch_tokens, seed=seed, progress=progress)
    path = run.folder / REROUTED
    path.parent.mkdir(exist_ok=True)
    table = table.assign(digest=loaded.digest, seed=seed)
    new = path.with_suffix(".new")
    table.to_parquet(new, index=False)
    new.replace(path)
    return table
