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

    @property
    def blocks(self) -> Integer[np.ndarray, " O"] | None:
        """Where classes may be shuffled: labels inside their sequence, families anywhere."""
        return self.sequence if self.kind == "label" else None

    @cached_property
    def comparable(self) -> Float64[np.ndarray, "O A"]:
        """How many tokens of each step or sequence can be told from the other classes, for each class.

        What is left of the class itself once it goes through the adjustment the choices go through: nothing where tokens, or
        the problem, give the class away. An effect on each token of the class reaches the residuals in this proportion.
        """
        member = np.eye(len(self.names))[self.codes]
        residual = member * self.tokens.n_tokens[:, None] - self.tokens.spread(self.tokens.per_owner.T @ member)
        return residual - self.problem_share(residual)

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
    return Classified("label", tuple(map(str, names)), codes, sequence, owner, _token_classes(run, owner, len(codes)))


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
    return Classified("family", tuple(map(str, names)), codes, np.arange(len(codes)), owner, tokens)


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
