"""What a step is, told from its routing, from its words, from its place, and from all of them, on held-out problems.

1. describe every step by the share of each expert in each layer (square roots, so that layers weigh alike; principal components
   where there are many experts), by its token ids and pairs of ids (tf-idf), and by its number, place and length (deciles);
2. fit a logistic regression to each description on four fifths of the problems, its regularisation chosen inside them;
3. score it on the fifth left out, in bits gained over the classes' frequencies, and in balanced accuracy;
4. the gain of all three over words and place is what routing adds.

Experts have read all that stands before a step, words of the step alone have not: a gain says that routing holds more than
these words, not that it understands them.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer
from scipy import sparse

from ling_probe.analysis.decoders import (
    ALL,
    DESCRIPTIONS,
    MOST_TOKENS,
    POSITION,
    ROUTING,
    TEXT,
    TOKENS,
    balanced_accuracy,
    bits,
    by_frequency,
    descriptions,
    folds,
    held_out,
    problem_mean,
    problem_weights,
    require_folds,
    require_steps,
    with_interval,
    with_steps,
)
from ling_probe.analysis.question import Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import interval_text, label_codes, numbered, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

LEAST_EFFECT = 0.05
"""Bits per step that are worth having."""
LEAST_PROBLEMS = 50
"""With fewer to learn from, that routing adds nothing says nothing."""


def label_decoding(run: Run, *, steps: int = 3000, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well a step's label and family can be told from its routing, its tokens, its position, and all together.

    One row a class of text (`about`: "label", "family") and description (`features`). `bits` per step gained over guessing by
    frequency, on held-out problems; below 0 is worse than guessing; `ci_low` and `ci_high` its 95 % bootstrap interval over
    problems; `entropy` is what there was to gain. `accuracy` balanced over `classes`, with its interval (`accuracy_low`,
    `accuracy_high`) and `chance`. `gain` in bits over tokens, with position or without, whichever tells more, with its
    interval (`gain_low`, `gain_high`). All from `steps` in `sequences`.

    Args:
        run: A run with step labels.
        steps: Steps of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of folds, samples and the sequences drawn.

    Raises:
        UsageError: The run has no step labels, one class of text only, or fewer than 5 problems.
    """
    world = _world(run, steps, seed)
    tables = []
    for about, codes in world.asked.items():
        losses, hits = {}, {}
        fallback, majority = by_frequency(world.fold, codes)
        for name in DESCRIPTIONS:
            predicted = held_out(world.features[name], codes, world.fold, fallback)
            losses[name] = bits(predicted, codes)
            hits[name] = predicted.argmax(axis=1) == codes
        tables.append(_table(world, codes, majority, losses, hits, draws, seed).assign(about=about))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "about", table.pop("about"))
    return table.assign(steps=len(world.sequence), sequences=int(world.sequence.max()) + 1, seed=seed)


@dataclass(frozen=True, eq=False)
class _World:
    """Steps and their descriptions."""

    features: dict[str, sparse.csr_array]
    sequence: Integer[np.ndarray, " U"]
    """Of each step, numbered."""
    fold: Integer[np.ndarray, " U"]
    """Of each step; whole sequences."""
    asked: dict[str, Integer[np.ndarray, " U"]]
    """Class of each step by what is asked."""


def _world(run: Run, most: int, seed: int) -> _World:
    require_steps(run)
    sample = with_steps(sample_tokens(run, most=MOST_TOKENS, seed=seed), most, seed)
    unit = numbered(sample.sequence, sample.step)
    rows = np.unique(unit, return_index=True)[1]
    sequence = numbered(sample.sequence[rows])
    require_folds(sequence)
    labels = label_codes(run, sample)[rows]
    families = run.sequences["family"].to_numpy(dtype=str)[sample.sequence[rows]]
    asked = {name: numbered(values) for name, values in (("label", labels), ("family", families)) if len(set(values)) > 1}
    if not asked:
        raise UsageError("one step label and one family only in this run; telling apart needs two")
    return _World(descriptions(sample, unit, rows, seed), sequence, folds(sequence, seed), asked)


def _table(
    world: _World,
    codes: Integer[np.ndarray, " U"],
    majority: Float64[np.ndarray, " U"],
    losses: dict[str, Float64[np.ndarray, " U"]],
    hits: dict[str, np.ndarray],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    every = problem_weights(world.sequence, draws=draws, seed=seed)
    text, rows = min((losses[name] for name in (TOKENS, TEXT)), key=np.mean), []
    for name in DESCRIPTIONS:
        numbers = {
            ("bits", "ci"): problem_mean(majority - losses[name], world.sequence, every),
            ("accuracy", "accuracy"): balanced_accuracy(hits[name], codes, world.sequence, every),
            ("gain", "gain"): problem_mean(text - losses[name], world.sequence, every),
        }
        told = {
            column: value
            for names, values in numbers.items()
            for column, value in with_interval(*names, values, every.shape[1]).items()
        }
        rows.append({"features": name, **told})
    n_classes = int(codes.max()) + 1
    return pd.DataFrame(rows).assign(entropy=float(majority.mean()), chance=1 / n_classes, classes=n_classes)


def _finding(table: pd.DataFrame) -> Finding:
    about = table["about"].iloc[0]
    told = table[table["about"] == about].set_index("features")
    row = told.loc[ALL]
    text = told.loc[max((TOKENS, TEXT), key=lambda name: told.loc[name, "bits"])]
    return Finding(
        sentence=(
            f"Of the {row['entropy']:.2f} bits of a step's {about}, held-out problems yield {told.loc[ROUTING, 'bits']:.2f} to "
            f"routing, {told.loc[TOKENS, 'bits']:.2f} to tokens, {told.loc[POSITION, 'bits']:.2f} to position, "
            f"{told.loc[TEXT, 'bits']:.2f} to tokens and position, {row['bits']:.2f} to all. Words and place leave "
            f"{row['entropy'] - text['bits']:.2f} bits to gain; routing adds {row['gain']:+.3f} "
            f"({interval_text(row['gain_low'], row['gain_high'], '+.3f')}). Balanced accuracy "
            f"{percent(told.loc[ROUTING, 'accuracy'])} by routing, {percent(text['accuracy'])} by text, "
            f"{percent(row['accuracy'])} by all, {percent(row['chance'])} by chance ({int(row['steps']):,} steps of "
            f"{int(row['sequences']):,} problems)."
        ),
        verdict=judge_held_out(
            row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=row["sequences"] >= LEAST_PROBLEMS
        ),
        rung=4 if row["gain_low"] > 0 else 0,
        effect=float(row["gain"]),
        unit="bits per step beyond tokens and position",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        token_effect=float(text["bits"]),
    )


LABEL_DECODING = Analysis(
    function=label_decoding,
    question="Can the kind of a step be told from its routing, beyond its words and its place?",
    claim="Routing tells a step's label better than its tokens and position alone.",
    method=(
        "Logistic regressions on expert shares, on token ids and pairs, and on position, five folds of whole problems; bits "
        "gained over guessing by frequency. Null: the same regression without routing; intervals from a bootstrap over "
        "problems."
    ),
    order=in_order,
    finding=_finding,
)
