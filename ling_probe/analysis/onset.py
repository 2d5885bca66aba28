"""How early in a step its label can be told from routing, and whether from the words so far as well.

At the n-th token of a step (0 is the token before its first), on the same steps for every n:

1. describe the routing of this one token (experts chosen in each layer), and the text: ids of the step's tokens so far, the
   last of them with the one before, ids of the step before, and the place; a step with fewer tokens keeps its last one;
2. learn the label from routing, from text, and from both on four fifths of the problems, score it on the fifth left out;
3. the gain of both over text is what routing tells that the step's words do not tell yet.

Experts have read the prompt and all steps before, the text here is two steps: a gain says that routing holds more than these
words, as a plan would be, or the prompt.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Integer
from scipy import sparse

from ling_probe import stats
from ling_probe.analysis.decoders import (
    MOST_TOKENS,
    bag,
    balanced_accuracy,
    bits,
    by_frequency,
    deciles,
    folds,
    gain_p,
    held_out,
    narrow,
    problem_mean,
    problem_weights,
    profile,
    require_folds,
    require_steps,
    tfidf,
    with_interval,
    with_steps,
)
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, in_order, judge_held_out, percent
from ling_probe.analysis.sample import TokenSample, interval_text, label_codes, numbered, sample_tokens
from ling_probe.errors import UsageError
from ling_probe.run import Run

ROUTING, TEXT, BOTH = DESCRIPTIONS = ("routing of the token", "text so far", "text so far and routing")
PLACES = (0, 1, 2, 3, 4, 6, 10, 16)
"""Tokens of a step at which its label is asked for; those that nine steps in ten do not reach are left out."""
LEAST_EFFECT = 0.05
"""Bits per step that are worth having."""
LEAST_PROBLEMS = 50
"""With fewer to learn from, that routing adds nothing says nothing."""


def label_onset(run: Run, *, steps: int = 1000, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well a step's label can be told at its n-th token, from the routing of that token, the text so far, and both.

    One row a `place` (0 is the token before the step's first) and description (`features`). `bits` per step gained over
    guessing by frequency on held-out problems, `ci_low` and `ci_high` its 95 % bootstrap interval over problems; `entropy` is
    what there was to gain. `accuracy` balanced over `classes`, with its interval (`accuracy_low`, `accuracy_high`) and
    `chance`. `gain` in bits over the text so far, with its interval (`gain_low`, `gain_high`), `p` one-sided from signs of
    problems flipped, `q` corrected over places (Benjamini-Hochberg). `reached` is the share of the steps that have so many
    tokens; others keep their last. All from `steps` in `sequences`; first steps, which follow the prompt, are left out.

    Args:
        run: A run with step labels.
        steps: Steps of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of folds, samples and the sequences drawn.

    Raises:
        UsageError: No step labels, one label only, or fewer than 5 problems of two steps.
    """
    world = _world(run, steps, seed)
    every = problem_weights(world.sequence, draws=draws, seed=seed)
    fallback, majority = by_frequency(world.fold, world.codes)
    rows = []
    for place in _places(world.length):
        seen = _seen(world, place, seed)
        predicted = {name: held_out(seen[name], world.codes, world.fold, fallback) for name in DESCRIPTIONS}
        loss = {name: bits(each, world.codes) for name, each in predicted.items()}
        for name in DESCRIPTIONS:
            hits, gain = predicted[name].argmax(axis=1) == world.codes, loss[TEXT] - loss[name]
            told = (
                ("bits", "ci", problem_mean(majority - loss[name], world.sequence, every)),
                ("accuracy", "accuracy", balanced_accuracy(hits, world.codes, world.sequence, every)),
                ("gain", "gain", problem_mean(gain, world.sequence, every)),
            )
            columns = {key: value for each in told for key, value in with_interval(*each, every.shape[1]).items()}
            p = gain_p(gain, world.sequence, seed=seed) if name == BOTH else np.nan
            rows.append({"place": place, "features": name, **columns, "p": p, "reached": (world.length >= place).mean()})
    table, classes = pd.DataFrame(rows), int(world.codes.max()) + 1
    table["q"] = stats.benjamini_hochberg(table["p"].to_numpy())
    shape = {"steps": len(world.codes), "sequences": every.shape[1], "seed": seed}
    return table.assign(entropy=float(majority.mean()), chance=1 / classes, classes=classes, **shape)


@dataclass(frozen=True, eq=False)
class _World:
    """Steps that follow another step, and the tokens of all steps."""

    sample: TokenSample
    unit: Integer[np.ndarray, " N"]
    """Step of each token, numbered over all steps."""
    start: Integer[np.ndarray, " U"]
    """Row of the first token of each step asked about."""
    length: Integer[np.ndarray, " U"]
    codes: Integer[np.ndarray, " U"]
    sequence: Integer[np.ndarray, " U"]
    fold: Integer[np.ndarray, " U"]


def _world(run: Run, most: int, seed: int) -> _World:
    require_steps(run)
    sample = with_steps(sample_tokens(run, most=MOST_TOKENS, seed=seed), most, seed)
    unit = numbered(sample.sequence, sample.step)
    start, length = np.unique(unit, return_index=True)[1], np.bincount(unit)
    # The token before a first step stands in the prompt, which the sample does not hold.
    kept = sample.follows[start] & (sample.step[start] > 0)
    labels, sequence = label_codes(run, sample)[start][kept], sample.sequence[start][kept]
    if len(np.unique(labels)) < 2:
        raise UsageError(f"{len(np.unique(labels))} labels of steps that follow another step; telling apart needs two")
    require_folds(sequence)
    numbers = numbered(sequence)
    return _World(sample, unit, start[kept], length[kept], numbered(labels), numbers, folds(numbers, seed))


def _places(length: Integer[np.ndarray, " U"]) -> list[int]:
    return [place for place in PLACES if place <= max(1.0, float(np.quantile(length, 0.9)))]


def _seen(world: _World, place: int, seed: int) -> dict[str, sparse.csr_array]:
    """Descriptions of each step at a place."""
    sample, n = world.sample, len(world.start)
    at = world.start + np.minimum(place, world.length) - 1
    fitted = np.ones(n, dtype=bool)
    routing = profile(sample.only(at), np.arange(n), seed, fitted)
    words = numbered(sample.token_id)
    owner, row = _so_far(world, at)
    before, earlier = _step_before(world)
    last = bag(np.arange(n), numbered(sample.previous_id[at], sample.token_id[at]), fitted)
    so_far = bag(owner, words[row], fitted) if len(row) else sparse.csr_array((n, 1))
    where = deciles((sample.step[world.start], sample.position[world.start]), fitted)
    text = sparse.hstack([tfidf([so_far, last], fitted), tfidf([bag(before, words[earlier], fitted)], fitted), where])
    both = sparse.hstack([text, routing])
    return {name: narrow(sparse.csr_array(each)) for name, each in zip(DESCRIPTIONS, (routing, text, both), strict=True)}


def _so_far(world: _World, at: Integer[np.ndarray, " U"]) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """Rows of each step's tokens up to the one asked at, with the number of the step."""
    return _ranges(world.start, at + 1)


def _step_before(world: _World) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """Rows of the tokens of the step before each step."""
    first = np.searchsorted(world.unit, world.unit[world.start - 1])
    return _ranges(first, world.start)


def _ranges(
    start: Integer[np.ndarray, " U"], stop: Integer[np.ndarray, " U"]
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """All whole numbers from each start up to its stop, and which range each is of.

    >>> [each.tolist() for each in _ranges(np.array([5, 9]), np.array([7, 10]))]
    [[0, 0, 1], [5, 6, 9]]
    """
    count = stop - start
    owner = np.repeat(np.arange(len(start)), count)
    return owner, start[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)


def _finding(table: pd.DataFrame) -> Finding:
    start = {str(row["features"]): row for _, row in table[table["place"] == 0].iterrows()}
    row, both = start[BOTH], table[table["features"] == BOTH]
    places = both.loc[(both["gain_low"] > 0) & (both["q"] < DISCOVERY), "place"].tolist()
    verdict = judge_held_out(
        row["gain_low"], row["gain_high"], least=LEAST_EFFECT, enough=bool(row["sequences"] >= LEAST_PROBLEMS)
    )
    return Finding(
        sentence=(
            f"Before a step's first token, held-out problems yield {start[ROUTING]['bits']:.2f} of its label's "
            f"{row['entropy']:.2f} bits to that token's routing (balanced accuracy {percent(start[ROUTING]['accuracy'])}, "
            f"{percent(row['chance'])} by chance), {start[TEXT]['bits']:.2f} to the text before it "
            f"({percent(start[TEXT]['accuracy'])}); there routing adds {row['gain']:+.3f} bits to the text "
            f"({interval_text(row['gain_low'], row['gain_high'], '+.3f')}). {_half(table)}. It adds to the text so far "
            f"(q below 0.05) at {_numbered(places)} ({int(row['steps']):,} steps of {int(row['sequences']):,} problems)."
        ),
        verdict=verdict,
        rung=4 if 0 in places else 0,
        effect=float(row["gain"]),
        unit="bits per step beyond the text so far",
        ci_low=float(row["gain_low"]),
        ci_high=float(row["gain_high"]),
        q=float(row["q"]),
        token_effect=float(start[TEXT]["bits"]),
    )


def _numbered(places: list[int]) -> str:
    return f"token {', '.join(map(str, places))}" if places else "no token"


def _half(table: pd.DataFrame) -> str:
    """From which token on either tells half of what there is to tell."""
    told = []
    for name in (ROUTING, TEXT):
        rows = table[(table["features"] == name) & (table["bits"] >= table["entropy"] / 2)]
        told.append(f"{name} from token {int(rows['place'].min())} on" if len(rows) else f"{name} at none")
    return f"Half of it is told by {told[0]}, by {told[1]}"


LABEL_ONSET = Analysis(
    function=label_onset,
    question="How early in a step can its kind be told from routing?",
    claim="Routing tells a step's label earlier than the words of the step do.",
    method=(
        "Logistic regressions at the n-th token of a step on the experts of that token, on the words so far with the step "
        "before and the place, and on both; five folds of whole problems, the same steps at every n. Null: the same without "
        "routing (signs of problems flipped), corrected over n; intervals from a bootstrap over problems."
    ),
    order=in_order,
    finding=_finding,
)
