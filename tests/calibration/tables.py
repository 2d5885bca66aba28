"""Write the tables of docs/validity.md, between their marks, from many more runs than the tests can afford.

python tests/calibration/tables.py [null] [naive] [power] [model] [--runs 200]
"""

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cases import CASES, LEVEL, Case, Counts, binomial_band, calibrate, mean_interval
from naive import step_shuffle, token_chi_square
from planted import CONFOUNDED, planted_world, power, true_effects
from planted_model import planted_model, problems, shuffled_labels, truth
from worlds import World

from ling_probe.analysis import label_specialisation
from ling_probe.analysis.question import DISCOVERY
from ling_probe.analysis.specialisation import LEAST_EFFECT
from ling_probe.recording import record

PAGE = Path(__file__).parents[2] / "docs" / "validity.md"
BOOSTS, SIZES = (0.5, 1.0, 2.0), (24, 48, 96, 192)


def null_table(runs: int) -> Iterator[str]:
    low, high = binomial_band(runs)
    yield f"{runs} runs a row; the 95 % band of a rate of 5 % is {low} to {high} runs ({low / runs:.1%} to {high / runs:.1%})."
    yield ""
    yield (
        "| analysis, world | one test a run | all tests, mean, 95 % interval over runs | runs with any q < 0.05 "
        '| runs with verdict "supported" | its interval holds what is true | |'
    )
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        counts, faults = calibrate(case, runs)
        yield _null_row(case, counts, faults)


def _null_row(case: Case, counts: Counts, faults: list[str]) -> str:
    n, cells = len(counts), ["–"] * 3
    if counts.tested:
        mean, least, most = counts.rate()
        cells = [f"{counts.rejected} ({counts.rejected / n:.1%})", f"{mean:.1%} ({least:.1%} to {most:.1%})"]
        cells.append(f"{counts.discovery.sum():.0f} ({counts.discovery.mean():.1%})")
    holds = "–" if np.isnan(counts.missed).all() else f"{1 - np.nanmean(counts.missed):.1%}"
    told = "off: " + ", ".join(faults) if faults else "lower, as expected" if case.reason and _low(counts) else "holds"
    return f"| {case} | {' | '.join(cells)} | {counts.supported.sum():.0f} ({counts.supported.mean():.1%}) | {holds} | {told} |"


def _low(counts: Counts) -> bool:
    return any("few" in fault for fault in counts.faults(may_be_low=False))


def naive_table(runs: int) -> Iterator[str]:
    yield "| labels | test | p ≤ 0.05, mean over runs | q < 0.05 |"
    yield "|---|---|---|---|"
    tests = {
        "chi-square over tokens": token_chi_square,
        "labels shuffled over whole steps, raw counts": step_shuffle,
        "`label_specialisation`": label_specialisation,
    }
    for name, world in (("use the same words", World(words=0.0)), ("use words of their own", CONFOUNDED)):
        drawn = [world.run(seed) for seed in range(max(2, runs // 10))]
        for test_name, test in tests.items():
            tables = [test(run) for run in drawn]
            p, _, _ = mean_interval(np.array([(table["p"] <= LEVEL).mean() for table in tables]))
            q, _, _ = mean_interval(np.array([(table["q"] < DISCOVERY).mean() for table in tables]))
            yield f"| {name} | {test_name} | {p:.1%} | {q:.1%} |"


def power_table(runs: int) -> Iterator[str]:
    yield "| logit | true log2 ratio | problems | found | cells found | of these wrong | bias, log2 | inside the interval |"
    yield "|---|---|---|---|---|---|---|---|"
    for boost in BOOSTS:
        world = planted_world(boost, 1)
        effects = true_effects(world)
        sizes = [effects[plant.layer, plant.expert, plant.label] for plant in world.plants]
        for n in SIZES:
            got = power(planted_world(boost, n), effects, range(max(2, runs // 5)))
            wrong = "–" if np.isnan(got.wrong) else f"{got.wrong:.1%}"
            yield (
                f"| {boost:g} | {min(sizes):.2f} to {max(sizes):.2f} | {n} | {got.recall:.0%} | {got.found:.1f} | {wrong} "
                f"| {got.bias:+.3f} | {got.covered:.1%} of {got.n} |"
            )


def model_table(_runs: int) -> Iterator[str]:
    yield "| run | q < 0.05: preferences, aversions | surely over 1.5 times | of them planted | planted found | p ≤ 0.05 |"
    yield "|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, bare = planted_model(place / "planted"), planted_model(place / "bare", planted=False)
        for name, loaded, benchmark in (
            ("planted", model, problems(60)),
            ("planted, labels shuffled over the steps of all problems", model, shuffled_labels(problems(60))),
            ("routers that do not read the operation", bare, problems(60)),
        ):
            table = label_specialisation(record(loaded, benchmark, place / f"run {name}"))
            found = table[table["q"] < DISCOVERY]
            sure = found[found["ci_low"] > LEAST_EFFECT]
            hits = set(zip(sure["layer"], sure["expert"], sure["label"], strict=True)) & truth()
            yield (
                f"| {name} | {(found['ci_low'] > 0).sum()}, {(found['ci_high'] < 0).sum()} | {len(sure)} | {len(hits)} "
                f"| {len(hits)} of {len(truth())} | {(table['p'] <= LEVEL).mean():.1%} of {table['p'].count()} |"
            )


TABLES = {"null": null_table, "naive": naive_table, "power": power_table, "model": model_table}


def write(name: str, lines: list[str]) -> None:
    """Put lines between a table's marks."""
    page = PAGE.read_text(encoding="utf-8")
    start, stop = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    body = "\n".join(lines)
    new = re.sub(f"{re.escape(start)}.*?{re.escape(stop)}", lambda _: f"{start}\n{body}\n\n{stop}", page, flags=re.DOTALL)
    PAGE.write_text(new, encoding="utf-8")


def main() -> None:
    """Write the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--runs", type=int, default=200, help="null runs a row; a fifth as many planted ones")
    asked = parser.parse_args()
    for name in asked.tables or TABLES:
        lines = []
        for line in TABLES[name](asked.runs):
            lines.append(line)
            write(name, lines)


if __name__ == "__main__":
    main()
