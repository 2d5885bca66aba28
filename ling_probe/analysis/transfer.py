"""Whether what routing tells about a step's kind holds for problems put in other words: learnt on one run, judged on another.

1. Describe the steps of both runs by routing, by words, and by place; words, means and deciles are those of the first run.
2. Learn the label from each description on the first run, on all its problems.
3. Score it on the other run, on problems that the first does not hold: bits gained over the first run's frequencies, and
   balanced accuracy; and beside it on held-out problems of the first run.
4. The gain of routing with words and place over words and place alone is what routing carries across.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.comparable import require_comparable, require_same_experts, run_names
from ling_probe.analysis.decoders import (
    ALL,
    DESCRIPTIONS,
    MOST_TOKENS,
    ROUTING,
    TEXT,
    TOKENS,
    balanced_accuracy,
    bits,
    by_frequency,
    descriptions,
    folds,
    frequencies,
    gain_p,
    held_out,
    learnt,
    problem_mean,
    problem_weights,
    require_folds,
    require_steps,
    shuffled_label_p,
    thirds,
    with_interval,
    with_steps,
)
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import TokenSample, interval_text, numbered, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EFFECT = 0.05
"""Bits per step that are worth having."""
LEAST_PROBLEMS = 50
"""With fewer to learn from, or to judge on, that routing adds nothing says nothing."""


def operation_transfer(
    runs: Sequence[Run], *, steps: int = 3000, draws: int = 1000, permutations: int = 999, seed: int = 0
) -> pd.DataFrame:
    """How well a decoder of steps' labels, learnt on the first run, tells those of other runs.

    One row a run judged on (`against`) and description (`features`). `bits` per step gained over guessing by the frequencies
    of the first run; below 0 is worse than guessing; `ci_low` and `ci_high` its 95 % bootstrap interval over problems; `p`
    one-sided, from labels shuffled over whole steps inside each problem and third of the solution; `entropy` is what there was
    to gain, `home` the bits on held-out problems of the first run. `accuracy` balanced over `classes`, with its interval
    (`accuracy_low`, `accuracy_high`), `chance` and `home_accuracy`. `gain` in bits over tokens, with position or without,
    whichever tells more, with its interval (`gain_low`, `gain_high`) and `gain_p`, one-sided, from signs of problems flipped.
    `q` corrects `gain_p` over the runs judged on (Benjamini-Hochberg). Learnt on `learnt_steps`, judged on `steps` in
    `sequences`; labels that one of the two runs lacks are left out.

    Args:
        runs: The run to learn on, and one or more to judge on.
        steps: Steps of whole sequences to draw from longer runs.
        draws: Bootstrap samples.
        permutations: Shuffles of labels.
        seed: Of everything drawn.

    Raises:
        UsageError: Runs that do not compare, without steps, without other problems, or that share fewer than two labels.
    """
    require_comparable(runs)
    for run in runs:
        require_steps(run)
    first, *others = runs
    tables = []
    for other, name in zip(others, run_names(runs)[1:], strict=True):
        require_same_experts(first, other, None)
        world = _world(first, other, steps, seed)
        tables.append(_table(world, draws, permutations, seed).assign(against=name))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "against", table.pop("against"))
    tested = table["features"] == ALL
    table["q"] = stats.benjamini_hochberg(table["gain_p"].where(tested).to_numpy())
    return table.assign(seed=seed)


@dataclass(frozen=True, eq=False)
class _World:
    """Steps of both runs, those of the first before those of the other."""

    features: dict[str, sparse.csr_array]
    codes: Integer[np.ndarray, " U"]
    home: Bool[np.ndarray, " U"]
    """Steps of the first run."""
    sequence: Integer[np.ndarray, " U"]
    """Of each step; numbered in each run."""
    block: Integer[np.ndarray, " U"]
    """Problem and third of the solution."""
    names: tuple[str, ...]


def _world(first: Run, other: Run, most: int, seed: int) -> _World:
    here, there = (with_steps(sample_tokens(run, most=MOST_TOKENS, seed=seed), most, seed) for run in (first, other))
    known = first.sequences["sequence_id"].iloc[np.unique(here.sequence)]
    new = ~other.sequences["sequence_id"].isin(known).to_numpy()[there.sequence]
    if not new.any():
        raise UsageError(
            f"every problem of {other.folder} is in {first.folder} too; a decoder is judged on problems that it did not learn"
        )
    parts = [_labelled(run, some) for run, some in ((first, here), (other, there.only(new)))]
    shared = sorted(set(parts[0][1]) & set(parts[1][1]))
    if len(shared) < 2:
        raise UsageError(f"{len(shared)} step labels in common between {first.folder} and {other.folder}; telling needs two")
    kept = [(sample.only(np.isin(label, shared)), label[np.isin(label, shared)]) for sample, label in parts]
    sample, label = _joined(*(each for each, _ in kept)), np.concatenate([each for _, each in kept])
    home = np.arange(sample.n_tokens) < kept[0][0].n_tokens
    unit = numbered(sample.sequence, sample.step)
    rows = np.unique(unit, return_index=True)[1]
    require_folds(sample.sequence[rows][home[rows]])
    blocks = [thirds(run, some.sequence, some.step) for run, (some, _) in zip((first, other), kept, strict=True)]
    sequence = [numbered(sample.sequence[rows][side]) for side in (home[rows], ~home[rows])]
    return _World(
        features=descriptions(sample, unit, rows, seed, fitted=home[rows]),
        codes=np.searchsorted(shared, label[rows]),
        home=home[rows],
        sequence=np.concatenate(sequence),
        block=np.concatenate(blocks)[rows],
        names=tuple(shared),
    )


def _labelled(run: Run, sample: TokenSample) -> tuple[TokenSample, np.ndarray]:
    """The tokens with the label of their steps."""
    first = np.searchsorted(run.steps["sequence"].to_numpy(), np.arange(len(run.sequences)))
    return sample, run.steps["label"].to_numpy(dtype=str)[first[sample.sequence] + sample.step]


def _joined(one: TokenSample, other: TokenSample) -> TokenSample:
    """Tokens of two samples; sequences of the second are numbered after those of the first."""
    moved = replace(other, sequence=other.sequence + int(one.sequence.max()) + 1)
    names = [each.name for each in fields(one) if each.name not in ("layers", "n_experts")]
    columns = {name: np.concatenate([getattr(one, name), getattr(moved, name)]) for name in names}
    return TokenSample(**columns, layers=one.layers, n_experts=one.n_experts)


def _table(world: _World, draws: int, permutations: int, seed: int) -> pd.DataFrame:
    home, away, n_classes = world.home, ~world.home, len(world.names)
    fold = folds(world.sequence[home], seed)
    own, codes = world.codes[home], world.codes[away]
    inner = np.zeros(len(home), dtype=bool)
    inner[home] = fold == 0
    fallback, own_majority = by_frequency(fold, own)
    guess = np.tile(frequencies(own, n_classes), (len(codes), 1))
    every, majority = problem_weights(world.sequence[away], draws=draws, seed=seed), bits(guess, codes)
    loss: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for name in DESCRIPTIONS:
        features = world.features[name]
        predicted = learnt(features, world.codes, home & ~inner, inner, away, guess)
        at_home = held_out(features[home], own, fold, fallback)
        loss[name] = bits(predicted, codes)
        hits = predicted.argmax(axis=1) == codes
        told = balanced_accuracy(hits, codes, world.sequence[away], every)
        at = at_home.argmax(axis=1) == own
        rows.append(
            {
                "features": name,
                **_mean("bits", "ci", majority - loss[name], world.sequence[away], every),
                "p": shuffled_label_p(predicted, codes, world.block[away], permutations=permutations, seed=seed),
                "home": float((own_majority - bits(at_home, own)).mean()),
                **with_interval("accuracy", "accuracy", told, every.shape[1]),
                "home_accuracy": float(np.mean([at[own == code].mean() for code in range(n_classes)])),
            }
        )
    text = min((loss[name] for name in (TOKENS, TEXT)), key=np.mean)
    for row in rows:
        gain = text - loss[row["features"]]
        row |= _mean("gain", "gain", gain, world.sequence[away], every)
        row["gain_p"] = gain_p(gain, world.sequence[away], seed=seed)
    return pd.DataFrame(rows).assign(
        entropy=float(majority.mean()),
        chance=1 / n_classes,
        classes=n_classes,
        learnt_steps=int(home.sum()),
        learnt_sequences=int(world.sequence[home].max()) + 1,
        steps=len(codes),
        sequences=every.shape[1],
    )


def _mean(
    name: str,
    stem: str,
    values: Float64[np.ndarray, " U"],
    sequence: Integer[np.ndarray, " U"],
    every: Float64[np.ndarray, "B S"],
) -> dict[str, float]:
    return with_interval(name, stem, problem_mean(values, sequence, every), every.shape[1])


def _finding(table: pd.DataFrame) -> Finding:
    told = table[table["against"] == table["against"].iloc[0]].set_index("features")
    row, routing = told.loc[ALL], told.loc[ROUTING]
    text = told.loc[max((TOKENS, TEXT), key=lambda name: told.loc[name, "bits"])]
    enough = min(row["learnt_sequences"], row["sequences"]) >= LEAST_PROBLEMS
    verdict = judge_held_out(row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=enough)
    found = row["gain_low"] > 0 and row["q"] < DISCOVERY
    return Finding(
        sentence=(
            f"Learnt on {int(row['learnt_steps']):,} steps and judged on {int(row['steps']):,} of {int(row['sequences']):,} "
            f"other problems, routing yields {routing['bits']:.2f} of the {row['entropy']:.2f} bits of a label "
            f"({routing['home']:.2f} at home; p = {routing['p']:.3f} with labels shuffled inside problem and third), tokens "
            f"and position {text['bits']:.2f} ({text['home']:.2f} at home). These leave {row['entropy'] - text['bits']:.2f} "
            f"bits to gain; routing adds {row['gain']:+.3f} ({interval_text(row['gain_low'], row['gain_high'], '+.3f')}). "
            f"Balanced accuracy {percent(routing['accuracy'])} by routing, {percent(text['accuracy'])} by text, "
            f"{percent(row['accuracy'])} by all, {percent(row['chance'])} by chance."
        ),
        verdict=verdict,
        rung=4 if found else 0,
        effect=float(row["gain"]),
        unit="bits per step beyond tokens and position",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        q=float(row["q"]),
        token_effect=float(text["bits"]),
    )


OPERATION_TRANSFER = Analysis(
    function=operation_transfer,
    question="Does what routing tells of the kind of a step hold for problems in other words?",
    claim="A decoder learnt on one run tells labels of another from routing better than from tokens and position alone.",
    method=(
        "Logistic regressions on expert shares, token ids and pairs, and position, learnt on the first run and scored on other "
        "problems of the second. Nulls: the same without routing (signs of problems flipped), and labels shuffled over whole "
        "steps inside each problem and third; intervals from a bootstrap over problems."
    ),
    order=in_order,
    finding=_finding,
    compares=True,
)
