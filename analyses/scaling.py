"""What more experts bring at the same compute per token.

    python analyses/scaling.py CHECKPOINT... [--split SPLIT] [--limit N] [--json]

For each checkpoint, and each family of stepbench and all of them: parameters, those active for a token, FLOPs of a token
(forward, averaged over a prefill of the mean problem's length), tokens and FLOPs of its training (three forward passes a token)
where it has a train.jsonl, the loss on the solutions (nats a token) with its interval, and exact answers by greedy generation.
`ling-probe train --preset tiny-16 --out FOLDER` (tiny-dense, tiny-32, tiny-64) makes checkpoints that differ in nothing else.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import transformers
from rich.console import Console
from rich.table import Table

from ling_probe.benchmarks import Record, read_benchmark
from ling_probe.cost import cost, read_config
from ling_probe.errors import LingProbeError
from ling_probe.evaluate import evaluate
from ling_probe.model.load import LoadedLing, load_native
from ling_probe.rerouting import rerouted_losses


def rows(name: str, records: list[Record]) -> pd.DataFrame:
    loaded = load_native(name)
    outcome = rerouted_losses(loaded, records).query("condition == 'true'")
    answers = evaluate(loaded, records).accuracy[["family", "correct", "share", "ci_low", "ci_high"]]
    losses = outcome[["family", "problems", "loss", "loss_low", "loss_high"]]
    known = {"checkpoint": name} | sizes(name, mean_length(loaded, records)) | training(name, mean_length(loaded, records))
    return losses.merge(answers, on="family").assign(**known)[[*known, *losses, *answers.columns[1:]]]


def mean_length(loaded: LoadedLing, records: list[Record]) -> int:
    texts = [record.prompt + record.solution for record in records]
    return round(sum(map(len, loaded.tokenizer(texts)["input_ids"])) / len(texts))


def sizes(name: str, length: int) -> dict[str, int]:
    found = cost(read_config(name), context=length)
    scores = next(part.flops for part in found.parts if part.name == "attention scores")
    flops = found.total.flops - scores + found.prefill_score_flops
    return {"parameters": found.total.parameters, "active": found.total.active, "flops": flops}


def training(name: str, length: int) -> dict[str, float]:
    log = Path(name) / "train.jsonl"
    tokens = json.loads(log.read_text().splitlines()[-1])["tokens"] if log.is_file() else float("nan")
    return {"trained_tokens": tokens, "trained_flops": 3 * sizes(name, length)["flops"] * tokens}


def show(table: pd.DataFrame) -> None:
    shown = Table(title="What do more experts bring at the same compute per token?")
    for column in table.columns:
        shown.add_column(str(column), justify="left" if column in ("checkpoint", "family") else "right")
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(markup=False, width=None if sys.stdout.isatty() else 220).print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    asked = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        problems = read_benchmark("stepbench", split=asked.split, limit=asked.limit).records
        found = pd.concat([rows(name, list(problems)) for name in asked.checkpoint])
    except LingProbeError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    if asked.json:
        sys.stdout.write(found.to_json(orient="records", lines=True))
    else:
        show(found)
