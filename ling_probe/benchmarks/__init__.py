"""Benchmark records, and the readers that make them.

A benchmark is read by name or path: what ships, JSON lines of any kind in `FORMATS`, documents, logs of evaluations, the hub,
reasoning-gym. Stepbench ships with the package; what makes its problems is `ling_probe.stepbench`, what cuts a solution into
steps is `ling_probe.steps`. A new kind of record is one entry in `ling_probe.benchmarks.formats`.
"""

from ling_probe.benchmarks.answers import Answer
from ling_probe.benchmarks.formats import FORMATS, Format, answer_of
from ling_probe.benchmarks.reading import read_benchmark
from ling_probe.benchmarks.record import PLAIN, Benchmark, Record, Step

__all__ = [
    "FORMATS",
    "PLAIN",
    "Answer",
    "Benchmark",
    "Format",
    "Record",
    "Step",
    "answer_of",
    "read_benchmark",
]
