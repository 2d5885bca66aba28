"""What the chosen experts know about a label that token identity and position do not: confounds first.

For each layer, with whole sequences split into two halves:

1. expect of every token what its half makes of all that is given (nothing, its id, its id and position, its id and the one
   before), and keep chosen minus expected, r;
2. sum r over each whole step; for step labels take out what the problem as a whole does, in proportion to the length of its
   steps; for correctness what its family does;
3. in each half by itself, find what each label adds to the rate of each expert, d, by least squares on what is left;
4. information = sum over labels and experts of p(label) d_1 d_2 / (2 ln 2 p_e (1 - p_e)), in bits.

That is the mutual information between a label and each expert's yes-or-no choice to second order, summed over experts: what two
experts both tell counts twice, and large amounts, as those of token ids, come out too large.

Plug-in information is too high, the more so the more experts and labels: noise squared does not cancel. The noise of two halves
does, so nothing has to be subtracted, whatever is given. The mean over shuffled labels would not do, for shuffling breaks the
tie between label and word that is given. Words of one label alone say nothing here: their form and their meaning cannot be told
apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.deviations import (
    Labelling,
    bundle_interval,
    deviations,
    diagonal_interval,
    half_weights,
    token_pairs,
)
from ling_probe.analysis.question import Analysis, Finding, Verdict, in_order, judge_gain, percent
from ling_probe.analysis.sample import (
    TokenSample,
    frequent,
    interval_text,
    label_codes,
    numbered,
    said,
    sample_tokens,
    two_halves,
)
from ling_probe.errors import UsageError
from ling_probe.run import Run

NOTHING, TOKEN, POSITION, BIGRAM = GIVEN = ("nothing", "token", "token and position", "token and the one before")
LEAST_EFFECT = 0.01
"""Bits per token and layer that are worth having."""
LEAST_COMPARED = 0.2
"""Share of tokens that can be compared below which nothing found says nothing."""
POSITION_BINS = 10
_FREQUENT = 10
"""Tokens that an id needs in each half for its own information to be measured."""
_BUNDLES, _TOKEN_BUNDLES = 100, 20
"""Bundles of sequences in each half for the intervals about labels, and about token ids."""


def routing_information(
    run: Run, *, permutations: int = 199, most: int = 50_000, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Bits that a token's chosen experts and a label, its id, its place tell about each other, beyond what is given.

    One row a layer (none: mean over layers), thing told (`about`: "label", "family", "correct"; and for comparison "token",
    "previous token", "position", "sequence") and `given` ("nothing", "token", "token and position", "token and the one
    before"). `bits` per token, unbiased, so chance is 0 and noise may fall below it; `ci_low`, `ci_high` its 95 % bootstrap
    interval over bundles of sequences; `p` one-sided from shuffling labels over whole steps inside each problem, families over
    sequences and correctness over those of one family; `q` corrects over layers (Benjamini-Hochberg, means apart). `compared`
    is the share of tokens with company of another label in what is given: where it is low, few `bits` say little. What a whole
    problem tells of its labels' mix is not counted. `tokens` in `sequences` inside steps, or of completions where a run has no
    steps.

    Args:
        run: A run with step labels, several families, or right and wrong answers.
        permutations: Shuffles of the test.
        most: Tokens of whole sequences to draw from a longer run.
        draws: Bootstrap samples.
        seed: Of everything drawn.

    Raises:
        UsageError: The run has one label, one family and one correctness.
    """
    world = _world(sample_tokens(run, most=most, seed=seed), seed)
    labellings = list(_labellings(run, world, permutations, seed))
    if not labellings:
        raise UsageError("no step labels, no second family and no mix of right and wrong answers in this run: nothing to tell")
    rows = [*_label_rows(world, labellings, draws, seed), *_source_rows(world, draws, seed)]
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    for some in (table["layer"].isna(), table["layer"].notna()):
        table.loc[some, "q"] = stats.benjamini_hochberg(table.loc[some, "p"].to_numpy())
    return table.assign(permutations=permutations, tokens=world.sample.n_tokens, sequences=world.sample.n_sequences, seed=seed)


@dataclass(frozen=True, eq=False)
class _World:
    """A sample and how it is divided."""

    sample: TokenSample
    sequence: Integer[np.ndarray, " N"]
    """Of each token, numbered in the sample."""
    unit: Integer[np.ndarray, " N"]
    """Whole steps, or sequences where there are none."""
    first: Bool[np.ndarray, " N"]
    """Tokens in the first half of the sequences."""
    bundle: Integer[np.ndarray, " N"]
    """Bundle of sequences, numbered in each half."""

    @cached_property
    def position(self) -> Integer[np.ndarray, " N"]:
        """Decile of the position."""
        edges = np.quantile(self.sample.position, np.linspace(0, 1, POSITION_BINS + 1)[1:-1])
        return np.searchsorted(edges, self.sample.position, side="right")

    def given(self, what: str, half: Bool[np.ndarray, " N"]) -> Integer[np.ndarray, " N"]:
        """Class of each token: what its half makes of all that is given."""
        token = self.sample.token_id
        columns = {NOTHING: (), TOKEN: (token,), POSITION: (token, self.position), BIGRAM: (token, self.sample.previous_id)}
        return numbered(half, *columns[what])

    def labelling(
        self,
        about: str,
        owner: Integer[np.ndarray, " N"],
        codes: Integer[np.ndarray, " U"],
        blocks: Integer[np.ndarray, " U"],
        permutations: int,
        seed: int,
    ) -> tuple[Labelling, Integer[np.ndarray, " N"]]:
        """Units with labels that are shuffled, and centred, inside blocks; with the unit of each token."""
        rows = np.unique(owner, return_index=True)[1]
        shuffled = stats.permute_labels(codes, blocks=blocks, draws=permutations, seed=seed)
        every, length = np.concatenate([codes[None], shuffled]), np.bincount(owner).astype(float)
        return Labelling(about, every, blocks, length, self.first[rows], self.bundle[rows]), owner


def _world(sample: TokenSample, seed: int) -> _World:
    if (sample.step >= 0).any():
        sample = sample.only(sample.step >= 0)
    sequence = numbered(sample.sequence)
    first = two_halves(sequence, seed=seed)
    bundle = _bundles(sequence, first, _BUNDLES, seed)
    return _World(sample, sequence, numbered(sequence, sample.step), first, bundle)


def _bundles(
    sequence: Integer[np.ndarray, " N"], first: Bool[np.ndarray, " N"], most: int, seed: int
) -> Integer[np.ndarray, " N"]:
    bundle = np.zeros(len(sequence), dtype=np.int64)
    for half in (first, ~first):
        place = numbered(sequence[half])
        bundle[half] = stats.bundles(int(place.max()) + 1, most=most, seed=seed)[place]
    return bundle


def _labellings(run: Run, world: _World, permutations: int, seed: int) -> Iterator[tuple[Labelling, Integer[np.ndarray, " N"]]]:
    sample, sequences = world.sample, run.sequences.iloc[np.unique(world.sample.sequence)]
    if (sample.step >= 0).any():
        rows = np.unique(world.unit, return_index=True)[1]
        labels = numbered(label_codes(run, sample)[rows])
        if labels.any():
            yield world.labelling("label", world.unit, labels, world.sequence[rows], permutations, seed)
    family = numbered(sequences["family"].to_numpy(dtype=str))
    if family.any():
        yield world.labelling("family", world.sequence, family, np.zeros_like(family), permutations, seed)
    if sequences["correct"].notna().all() and len(sequences["correct"].unique()) > 1:
        right = sequences["correct"].to_numpy(dtype=np.int64)
        yield world.labelling("correct", world.sequence, right, family, permutations, seed)


def _label_rows(
    world: _World, labellings: Sequence[tuple[Labelling, Integer[np.ndarray, " N"]]], draws: int, seed: int
) -> Iterator[dict[str, object]]:
    for each, owner in labellings:
        for given in GIVEN:
            classes = world.given(given, world.first)
            pairs, shuffled = [], []
            for place in range(len(world.sample.layers)):
                values = each.centred(deviations(world.sample, place, classes, owner, len(each.length)))
                pairs.append(each.pairs(values))
                shuffled.append(each.by_shuffle(values))
            bits, interval = np.sum(pairs, axis=(1, 2)), bundle_interval(np.stack(pairs), draws=draws, seed=seed)
            compared = _compared(classes, each.codes[0][owner])
            yield from _rows(world, each.about, given, bits, interval, _one_sided(np.stack(shuffled)), compared)


def _compared(classes: Integer[np.ndarray, " N"], label: Integer[np.ndarray, " N"]) -> float:
    """Share of tokens whose class holds two labels or more."""
    most, least = (np.zeros(int(classes.max()) + 1, dtype=np.int64) for _ in range(2))
    least += int(label.max())
    np.maximum.at(most, classes, label)
    np.minimum.at(least, classes, label)
    return float((most > least)[classes].mean())


def _one_sided(shuffled: Float64[np.ndarray, "M P"]) -> Float64[np.ndarray, " L"]:
    """P of each layer, and of the mean over layers; the first labelling is the one seen."""
    every = np.concatenate([shuffled, shuffled.mean(axis=0, keepdims=True)])
    return stats.permutation_p((every[:, 1:] >= every[:, :1] - 1e-9).sum(axis=1), every.shape[1] - 1)


def _source_rows(world: _World, draws: int, seed: int) -> Iterator[dict[str, object]]:
    sample = world.sample
    bundle = _bundles(world.sequence, world.first, _TOKEN_BUNDLES, seed)
    asked = (
        ("token", NOTHING, frequent(sample.token_id, world.first, _FREQUENT)),
        ("previous token", TOKEN, frequent(sample.previous_id, world.first, _FREQUENT)),
        ("position", TOKEN, world.position),
    )
    for about, given, group in asked:
        classes = world.given(given, world.first)
        pairs = [token_pairs(sample, place, classes, group, world.first, bundle) for place in range(len(sample.layers))]
        interval = bundle_interval(np.stack(pairs), draws=draws, seed=seed)
        yield from _rows(world, about, given, np.sum(pairs, axis=(1, 2)), interval)
    told = _by_sequence(world)
    bundle = stats.bundles(told.shape[1], most=_BUNDLES, seed=seed)
    values = np.stack([np.bincount(bundle, weights=each) for each in told])
    yield from _rows(world, "sequence", TOKEN, told.sum(axis=1), diagonal_interval(values, draws=draws, seed=seed))


def _by_sequence(world: _World) -> Float64[np.ndarray, "M S"]:
    """Bits that even and odd steps of a sequence agree on; stretches of 64 tokens where there are no steps."""
    sample, sequence, n = world.sample, world.sequence, int(world.sequence.max()) + 1
    half = (sample.step if (sample.step >= 0).any() else sample.position // 64) % 2 == 0
    weights = half_weights(sequence, np.full(sample.n_tokens, 1.0), half, n)
    classes, told = world.given(TOKEN, half), []
    for place in range(len(sample.layers)):
        values = deviations(sample, place, classes, np.where(half, sequence, n + sequence), 2 * n)
        told.append((values[:n] * values[n:]).sum(axis=1) * weights[0] * weights[1])
    return np.stack(told)


def _rows(
    world: _World,
    about: str,
    given: str,
    bits: Float64[np.ndarray, " M"],
    interval: tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]],
    p: Float64[np.ndarray, " L"] | None = None,
    compared: float = np.nan,
) -> Iterator[dict[str, object]]:
    """A row a layer, and one for their mean."""
    for place, layer in enumerate((*world.sample.layers, None)):
        yield {
            "about": about,
            "given": given,
            "layer": layer,
            "bits": float(bits.mean() if layer is None else bits[place]),
            "ci_low": interval[0][place],
            "ci_high": interval[1][place],
            "p": np.nan if p is None else p[place],
            "compared": compared,
        }


def _finding(table: pd.DataFrame) -> Finding:
    means = table[table["layer"].isna()]
    about = means["about"].iloc[0]
    told = means[means["about"] == about].set_index("given")
    choice = means[means["about"].isin(["token", "previous token", "position", "sequence"])].set_index("about")["bits"]
    row = told.loc[POSITION]
    name = {"label": "step label", "family": "family", "correct": "answer being right"}[about]
    return Finding(
        sentence=(
            f"A layer's chosen experts tell {_bits(told.loc[NOTHING])} about the {name}; {_bits(told.loc[TOKEN])} given the "
            f"token, {_bits(row)} given token and position (p {row['p']:.3g}), {_bits(told.loc[BIGRAM])} given the token and "
            f"the one before it (p {told.loc[BIGRAM, 'p']:.3g}; {percent(told.loc[BIGRAM, 'compared'])} of tokens can be "
            f"compared). The token tells {choice['token']:.2f} bits about the choice, and once it is known the one before "
            f"{choice['previous token']:.3f}, position {choice['position']:.3f}, the sequence {choice['sequence']:.3f} (mean "
            f"over layers, {said(table)})."
        ),
        verdict=_verdict(row),
        rung=2 if row["p"] < 0.05 and row["ci_low"] > 0 else 0,
        effect=float(row["bits"]),
        unit="bits per token, mean over layers",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(told.loc[NOTHING, "bits"] - told.loc[TOKEN, "bits"]),
    )


def _verdict(row: pd.Series) -> Verdict:
    """Where few tokens can be compared, few bits are no evidence of absence."""
    verdict = judge_gain(row["ci_low"], row["ci_high"], least=LEAST_EFFECT, q=float(row["p"]))
    return Verdict.CANNOT_TELL if verdict is Verdict.NOT_SUPPORTED and row["compared"] < LEAST_COMPARED else verdict


def _bits(row: pd.Series) -> str:
    return f"{row['bits']:.3f} bits ({interval_text(row['ci_low'], row['ci_high'])})"


ROUTING_INFORMATION = Analysis(
    function=routing_information,
    question="Do the chosen experts know more about a step than its tokens and their place?",
    claim="The chosen experts carry information about the label beyond token id and position.",
    method=(
        "Information between the label and each expert's choice, summed over experts, to second order: chosen minus expected "
        "from what is given, multiplied between two halves of the sequences so that chance is 0. Null: labels shuffled over "
        "whole steps inside each problem; intervals from a bootstrap over bundles of sequences."
    ),
    order=in_order,
    finding=_finding,
)
