"""A run on disk: a manifest and parts of plain Parquet, the one thing that passes from capture to analysis.

    run.json                        what was run on what, and the parts with their digests
    experts.safetensors             one vector an expert for what it listens to and what it writes; not of a streamed model
    parts/00000/sequences.parquet   one row a sequence
    parts/00000/steps.parquet       one row a reasoning step
    parts/00000/tokens.parquet      one row a token; per routed layer L experts_L, weights_L, and what else was kept
    parts/00000/activations.safetensors   vectors of chosen sites, if asked for
    analysis/NAME.parquet           answers kept by `analysis.kept`; not of the run, and can be deleted

`manifest` is what run.json says, `tables` what the Parquet files hold, `vectors` and `experts` what the safetensors do, `store`
the folder: whole parts or none, resume, reading by columns. `partition` says which records make which part, `merge` joins what
several machines wrote, `check` finds damage, and `folder` holds the lock of the one writer.
"""

from ling_probe.run.experts import EXPERTS
from ling_probe.run.manifest import SCHEMA, Manifest, Part
from ling_probe.run.merge import find_shards, merge, summarise
from ling_probe.run.partition import Shard, cut
from ling_probe.run.store import Run
from ling_probe.run.tables import TokenBatch
from ling_probe.run.vectors import ActivationBatch

__all__ = [
    "EXPERTS",
    "SCHEMA",
    "ActivationBatch",
    "Manifest",
    "Part",
    "Run",
    "Shard",
    "TokenBatch",
    "cut",
    "find_shards",
    "merge",
    "summarise",
]
