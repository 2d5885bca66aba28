"""What several commands take: their arguments and options."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


class DtypeName(StrEnum):
    """Weight types a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Change(StrEnum):
    """Ways to change routing in a causal study."""

    exclude = "exclude"
    silence = "silence"
    force = "force"
    bias = "bias"
    route_as = "route_as"


class SteeringMeasure(StrEnum):
    """What a steering vector says of an expert."""

    risk_difference = "risk-difference"
    information = "information"


class Tunable(StrEnum):
    """What an adaptation may move."""

    router = "router"
    bias = "bias"
    experts = "experts"
    all = "all"


class OnError(StrEnum):
    """What a record that cannot be read does."""

    stop = "stop"
    skip = "skip"


class DepthName(StrEnum):
    """How much a report tells."""

    summary = "summary"
    full = "full"
    expert = "expert"


class TableName(StrEnum):
    """Files a report's tables can be written as."""

    csv = "csv"
    json = "json"
    parquet = "parquet"


class StepsName(StrEnum):
    """How the reasoning steps of a text are found."""

    auto = "auto"
    annotated = "annotated"
    rules = "rules"
    sentences = "sentences"
    lines = "lines"


Model = Annotated[
    str, typer.Argument(help="A checkpoint folder, a hub repository, or a shipped one (ling-tiny); NAME@step-N is a snapshot.")
]
BenchmarkName = Annotated[
    str,
    typer.Argument(
        help="A shipped benchmark (stepbench), a file (.jsonl, .json, .txt, an Inspect .eval), "
        "hf:OWNER/DATASET[:CONFIG[:SPLIT]] or gym:TASK[:size=N][:seed=N]."
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Against = Annotated[list[Path] | None, typer.Option(help="A run to compare with; repeatable.", metavar="RUN")]
Split = Annotated[str, typer.Option(help="Which split of a benchmark.")]
Limit = Annotated[int | None, typer.Option(help="At most so many problems.", min=1)]
Tables = Annotated[list[TableName] | None, typer.Option(help="Files of each table; repeatable (default csv and json).")]
Pdf = Annotated[bool, typer.Option("--pdf", help="Print the page into report.pdf too, by an installed Chromium.")]
Json = Annotated[bool, typer.Option("--json", help="Print rows as JSON lines instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName, typer.Option(help="auto is the checkpoint's own on a GPU, float32 on the CPU.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")]
BatchTokens = Annotated[int, typer.Option(help="Padded tokens of one forward pass.", min=1)]
Generate = Annotated[
    int,
    typer.Option(help="Let the model also solve so many problems itself under each change, greedily; 0 reads alone.", min=0),
]
GenerateDraws = Annotated[int, typer.Option(help="With --generate: so many of the matched draws solve them too.", min=1)]
Steer = Annotated[
    Path | None, typer.Option(help="Steer with this vector, which ling-probe steer made, at --strength.", metavar="FILE")
]
Strength = Annotated[float | None, typer.Option(help="With --steer: what its largest value adds to a choice score.")]


class CacheDtypeName(StrEnum):
    """Number types that keys and values can be cached in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float8 = "float8"


Fresh = Annotated[bool, typer.Option("--fresh", help="Compute anew what the run's folder keeps of earlier answers.")]
Workers = Annotated[int, typer.Option(help="Processes that share the analyses.", min=1)]
WORKERS = min(2, os.cpu_count() or 1)
"""Each holds up to a gigabyte on a large run."""
