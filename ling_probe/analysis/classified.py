"""Steps and families: what carries a class of meaning, and the choices its tokens alone would make."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Integer

from ling_probe.analysis.counting import Owner, TokenClasses, count_choices, require_sequences, segment_mask, sum_by
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

REASONING = ("reasoning",)
COMPLETION = ("reasoning", "answer")


@dataclass(frozen=True)
class Classified:
    """Whole steps with their label, or whole sequences with their family; O of them own the tokens that count."""

    kind: str
    """Name of the class column: label or family."""
    names: tuple[str, ...]
    """The classes, sorted."""
    codes: Integer[np.ndarray, " O"]
    """Class of each step or sequence, an index into `names`."""
    sequence: Integer[np.ndarray, " O"]
    """Its sequence: the unit of the bootstrap."""
    owner: Owner
    """Maps tokens to steps or sequences."""
    tokens: TokenClasses
    """The token classes of each step or sequence."""
    stratum: Integer[np.ndarray, " O"]
    """Steps are compared inside their family only; families are all in one stratum."""

    @property
    def blocks(self) -> Integer[np.ndarray, " O"] | None:
        """Where classes may be shuffled: labels inside their sequence, families anywhere."""
        return self.sequence if self.kind == "label" else None

    @cached_property
    def equal_token_weights(self) -> Float64[np.ndarray, "A 2 F N"]:
        """Weight of a token by class of meaning, side (0 inside, 1 outside), stratum and token class.

        With n tokens of one kind inside and m outside, each inside token weighs m/(n+m) and each outside token n/(n+m): both
        sides then hold the same words in the same proportions (direct standardisation), and words of one side alone weigh 0.
        """
        n_strata = int(self.stratum.max()) + 1
        counts = np.zeros((len(self.names), n_strata, self.tokens.per_owner.shape[1]))
        for code in range(len(self.names)):
            for stratum in range(n_strata):
                rows = (self.codes == code) & (self.stratum == stratum)
                counts[code, stratum] = np.asarray(self.tokens.per_owner[rows].sum(axis=0)).ravel()
        total = counts.sum(axis=0)
        share = counts / np.maximum(total, 1)
        return np.stack([np.where(total > 0, 1 - share, 0.0), share], axis=1)

    def problem_share(self, residual: Float64[np.ndarray, "O C"]) -> Float64[np.ndarray, "O C"]:
        """Each step's share of its problem's residual, by its part of the problem's tokens; nothing for families.

        Taking it out centres the whole-step permutation on 0 and keeps long steps from passing for special ones.
        """
        if self.kind != "label":
            return np.zeros_like(residual)
        n_sequences, length = int(self.sequence.max()) + 1, self.tokens.n_tokens[:, None]
        total = sum_by(residual, self.sequence, n_sequences)
        tokens = sum_by(length, self.sequence, n_sequences)
        return total[self.sequence] * length / np.maximum(tokens[self.sequence], 1)


@dataclass(frozen=True)
class Choices:
    """Choices of one layer's experts by each step or sequence."""

    observed: Float64[np.ndarray, "O E"]
    expected: Float64[np.ndarray, "O E"]
    """What its tokens, and for steps its problem, would make of them."""


def classified_steps(run: Run) -> Classified:
    """Steps of a run by their label; only reasoning tokens inside steps count.

    Raises:
        UsageError: The run has no step labels.
    """
    steps = run.steps
    if steps.empty:
        raise UsageError("no step labels in this run")
    sequence = steps["sequence"].to_numpy()
    # Steps stand in the order of their sequences and are numbered from 0 in each.
    first = np.searchsorted(sequence, np.arange(len(run.sequences)))

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        counted = (batch.step >= 0) & segment_mask(batch, REASONING)
        return np.where(counted, first[batch.sequence] + batch.step, -1)

    names, codes = np.unique(steps["label"].to_numpy(dtype=str), return_inverse=True)
    _, family = np.unique(run.sequences["family"].to_numpy(dtype=str), return_inverse=True)
    tokens = _token_classes(run, owner, len(codes))
    return Classified("label", tuple(map(str, names)), codes, sequence, owner, tokens, family[sequence])


def classified_families(run: Run) -> Classified:
    """Sequences of a run by their family; only tokens of the completion count.

    Raises:
        UsageError: The run has fewer than two families, or no completions.
    """
    require_sequences(run)
    names, codes = np.unique(run.sequences["family"].to_numpy(dtype=str), return_inverse=True)
    if len(names) < 2:
        raise UsageError(f"one family only in this run ({names[0] or 'unnamed'}); comparing needs two")

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        return np.where(segment_mask(batch, COMPLETION), batch.sequence, -1)

    tokens = _token_classes(run, owner, len(codes))
    return Classified("family", tuple(map(str, names)), codes, np.arange(len(codes)), owner, tokens, np.zeros_like(codes))


@dataclass(frozen=True)
class EqualTokens:
    """Choices of one layer inside and outside a class of meaning, with both sides weighted to the same words."""

    choices: Float64[np.ndarray, "2 S E"]
    """Weighted choices by side and sequence."""
    tokens: Float64[np.ndarray, "2 S"]
    """Weight of the tokens that chose."""


def at_equal_tokens(run: Run, layer: int, classified: Classified) -> list[EqualTokens]:
    """For each class of meaning, who is chosen inside and outside it at equal words."""
    n_sequences, n_experts = len(run.sequences), run.spec.n_experts
    choices = np.zeros((len(classified.names), 2 * n_sequences * n_experts))
    tokens = np.zeros((len(classified.names), 2 * n_sequences))
    for batch in run.batches(layers=[layer]):
        owners = classified.owner(batch)
        kept = owners >= 0
        owners, ids = owners[kept], batch.expert_ids[kept, 0].astype(np.int64)
        stratum, word = classified.stratum[owners], classified.tokens.class_of[batch.token_id[kept]]
        for code, weights in enumerate(classified.equal_token_weights):
            side = (classified.codes[owners] != code).astype(np.int64)
            weight, row = weights[side, stratum, word], side * n_sequences + batch.sequence[kept]
            tokens[code] += np.bincount(row, weights=weight, minlength=tokens.shape[1])
            cells = (row[:, None] * n_experts + ids).ravel()
            choices[code] += np.bincount(cells, weights=np.repeat(weight, ids.shape[1]), minlength=choices.shape[1])
    return [
        EqualTokens(each.reshape(2, n_sequences, n_experts), weight.reshape(2, n_sequences))
        for each, weight in zip(choices, tokens, strict=True)
    ]


def expected_choices(run: Run, layer: int, classified: Classified) -> Choices:
    """Choices of each step or sequence in one layer, and those to expect of it."""
    observed = count_choices(run, layer, classified.owner, len(classified.codes)).astype(float)
    expected = classified.tokens.expected(run, layer, classified.owner)
    return Choices(observed, expected + classified.problem_share(observed - expected))


def _token_classes(run: Run, owner: Owner, n_owners: int) -> TokenClasses:
    tokens = TokenClasses.of(run, owner, n_owners)
    if not tokens.n_tokens.any():
        raise UsageError("no completions in this run, prompts alone")
    return tokens
