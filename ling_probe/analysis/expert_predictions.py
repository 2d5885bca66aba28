"""How far each expert's being chosen follows from what is known of the token, on sequences that were not counted.

For every expert, being chosen is a yes or no. `explained` is the share of its uncertainty, given how often it is chosen, that a
predictor removes on held-out tokens: 1 - loss / loss by load alone, losses in bits (binary cross-entropy). 1 is certainty, 0 is
no more than the load tells, and a predictor that misleads falls below. Predictors and halves are those of `routing_prediction`.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe.analysis.prediction import BIGRAM, LOAD, TOKEN, held_out_tokens, known_classes, predictions
from ling_probe.analysis.question import Analysis, Finding, judge_gain, percent
from ling_probe.analysis.sample import interval_text, resampled_interval, sample_tokens
from ling_probe.run import Run

LEAST_CHOSEN = 20
"""Tested tokens that must have chosen an expert for the finding to count it."""
LEAST_EFFECT = 0.02
"""Share of the uncertainty that is worth having."""


def expert_prediction(run: Run, *, tested: int = 2000, most: int = 100_000, draws: int = 500, seed: int = 0) -> pd.DataFrame:
    """How well each expert's choice by held-out tokens is predicted, by what is known of the token.

    One row a layer, expert and predictor (`known`): `chosen` tested tokens that chose the expert, `recall` the share of them
    that have it among their K most probable, `explained` (see above) with its 95 % bootstrap interval over sequences
    (`ci_low`, `ci_high`), and `beyond_token`, what it explains more than the token (`beyond_low`, `beyond_high`).

    Args:
        run: Any run.
        tested: Tokens drawn from each half.
        most: Tokens of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of halves, samples and everything drawn.
    """
    sample = sample_tokens(run, most=most, seed=seed)
    splits, bundle, weights = held_out_tokens(sample, tested, draws=draws, seed=seed)
    classes, tables = known_classes(run, sample), []
    for place, layer in enumerate(sample.layers):
        found = [dict(predictions(sample, place, split, classes)) for split in splits]
        whole = {known: np.concatenate([each[known] for each in found]) for known in found[0]}
        chosen = np.concatenate([sample.take(split.test, place) for split in splits])
        tables.append(pd.concat(_by_expert(whole, chosen, bundle, weights)).assign(layer=layer))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "layer", table.pop("layer"))
    return table.assign(tested=len(bundle), tokens=sample.n_tokens, sequences=sample.n_sequences, seed=seed)


def _by_expert(
    predicted: dict[str, Float64[np.ndarray, "T E"]],
    chosen: Integer[np.ndarray, "T K"],
    bundle: Integer[np.ndarray, " T"],
    weights: Float64[np.ndarray, "B U"],
) -> Iterator[pd.DataFrame]:
    n_units = weights.shape[1]
    every = np.concatenate([np.ones((1, n_units)), weights])
    taken: np.ndarray = np.zeros(predicted[LOAD].shape, dtype=bool)
    np.put_along_axis(taken, chosen, values=True, axis=1)
    member = np.zeros((n_units, len(bundle)))
    member[bundle, np.arange(len(bundle))] = 1
    loss = {known: every @ (member @ _bits(values, taken)) for known, values in predicted.items()}
    for known, values in predicted.items():
        explained = 1 - loss[known] / np.maximum(loss[LOAD], 1e-12)
        beyond = (loss[TOKEN] - loss[known]) / np.maximum(loss[LOAD], 1e-12)
        low, high = resampled_interval(explained[1:], n_units)
        beyond_low, beyond_high = resampled_interval(beyond[1:], n_units)
        yield pd.DataFrame(
            {
                "expert": np.arange(taken.shape[1]),
                "known": known,
                "chosen": taken.sum(axis=0),
                "recall": _recall(values, taken, chosen.shape[1]),
                "explained": explained[0],
                "ci_low": low,
                "ci_high": high,
                "beyond_token": beyond[0],
                "beyond_low": beyond_low,
                "beyond_high": beyond_high,
            }
        )


def _bits(predicted: Float64[np.ndarray, "T E"], taken: np.ndarray) -> Float64[np.ndarray, "T E"]:
    likely = np.clip(predicted, 1e-6, 1 - 1e-6)
    return -np.log2(np.where(taken, likely, 1 - likely))


def _recall(predicted: Float64[np.ndarray, "T E"], taken: np.ndarray, k: int) -> Float64[np.ndarray, " E"]:
    best = np.zeros(taken.shape, dtype=bool)
    np.put_along_axis(best, np.argpartition(-predicted, k - 1, axis=1)[:, :k], values=True, axis=1)
    return (best & taken).sum(axis=0) / np.where(taken.any(axis=0), taken.sum(axis=0), np.nan)


def least_explained_first(table: pd.DataFrame) -> pd.DataFrame:
    """The token's rows first, experts that it explains least at the top."""
    return table.iloc[np.lexsort((table["explained"], table["known"] != TOKEN))]


def _finding(table: pd.DataFrame) -> Finding:
    counted = table[table["chosen"] >= LEAST_CHOSEN]
    token, context = (counted[counted["known"] == known] for known in (TOKEN, BIGRAM))
    if token.empty:
        few = f"No expert was chosen by {LEAST_CHOSEN} of the {table['tested'].iloc[0]} tested tokens."
        return Finding(sentence=few, verdict=judge_gain(np.nan, np.nan, least=LEAST_EFFECT))
    least, most = (token.iloc[int(place)] for place in (np.argmin(token["explained"]), np.argmax(token["explained"])))
    low, high, middle = (float(context[name].median()) for name in ("beyond_low", "beyond_high", "beyond_token"))
    return Finding(
        sentence=(
            f"The token explains {percent(float(token['explained'].median()))} of what the load leaves open about the median "
            f"expert, from {percent(least['explained'])} (layer {least['layer']}, expert {least['expert']}; "
            f"{interval_text(least['ci_low'], least['ci_high'], '.2f')}) to {percent(most['explained'])} (layer "
            f"{most['layer']}, expert {most['expert']}). The token before adds {percent(middle)} for the median expert, and "
            f"surely something for {int((context['beyond_low'] > 0).sum())} of {len(context)} experts."
        ),
        verdict=judge_gain(low, high, least=LEAST_EFFECT),
        rung=4 if low > 0 else 0,
        effect=middle,
        unit="share of an expert's uncertainty, median expert",
        ci_low=low,
        ci_high=high,
        token_effect=float(token["explained"].median()),
    )


EXPERT_PREDICTION = Analysis(
    function=expert_prediction,
    question="Which experts follow the token, and which the context?",
    claim="The median expert is better predicted by the token and the one before than by the token.",
    method=(
        "1 - loss / loss by load alone of each expert being chosen, binary cross-entropy on tokens of sequences that were not "
        "counted; intervals from a bootstrap over sequences, that of the median expert the median of all. Null: load alone, "
        "and token alone."
    ),
    order=least_explained_first,
    finding=_finding,
)
