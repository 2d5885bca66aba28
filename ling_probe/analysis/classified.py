"""Steps, families and answers: what carries a class of meaning, and the choices its tokens alone would make.

A run is read part by part. A part holds whole sequences, so all of a step or a sequence is at hand at once; what a token's
identity makes of it (`token_rates`) needs one pass over the run before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Integer
from scipy import sparse

from ling_probe.analysis.counting import Owner, require_sequences, segment_mask, sum_by
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

REASONING = ("reasoning",)
COMPLETION = ("reasoning", "answer")
RIGHT, WRONG = "right", "wrong"
PLACES = 3
"""Parts of a solution, by the number of its steps; what a token makes of it may differ between them."""


@dataclass(frozen=True)
class Classified:
    """Whole steps with their label, or whole sequences with their family or answer; O of them own the tokens that count."""

    kind: str
    """Name of the class column: label, family or answer."""
    names: tuple[str, ...]
    """The classes, sorted."""
    codes: Integer[np.ndarray, " O"]
    """Class of each step or sequence, an index into `names`."""
    sequence: Integer[np.ndarray, " O"]
    """Its sequence, in ascending order."""
    stratum: Integer[np.ndarray, " O"]
    """Steps are compared inside their family and part of the solution, answers inside their family, families all with all."""
    owner: Owner
    """Maps tokens to steps or sequences."""
    n_tokens: Float64[np.ndarray, " O"]
    """Tokens of each."""
    word_of: Integer[np.ndarray, " X"]
    """Token class of stratum times vocabulary plus token id; -1 where none occurs.

    Rare ids are not pooled: a pool would let the words of one label stand for those of another. An id seen once then expects
    what it did, and says nothing.
    """

    @property
    def n_words(self) -> int:
        """Number of token classes."""
        return int(self.word_of.max()) + 1

    @property
    def n_strata(self) -> int:
        """Number of strata."""
        return int(self.stratum.max()) + 1

    @property
    def within_sequences(self) -> bool:
        """Whether classes may be shuffled inside their sequence only; otherwise inside their stratum."""
        return self.kind == "label"


@dataclass(frozen=True)
class Part:
    """The n tokens of one part of a run that count, in some layers, and the steps or sequences that own them."""

    rows: slice
    """The owners of this part, all of them."""
    owner: Integer[np.ndarray, " n"]
    """Owner of each token, counted from the first of this part."""
    word: Integer[np.ndarray, " n"]
    """Token class."""
    expert_ids: Integer[np.ndarray, "n M K"]
    n_words: int
    n_experts: int

    @property
    def words(self) -> sparse.csr_array:
        """Tokens of each class of each owner."""
        shape = (self.rows.stop - self.rows.start, self.n_words)
        return sparse.csr_array((np.ones(len(self.owner), np.float32), (self.owner, self.word)), shape=shape)

    def cells(self, row: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " nK"]:
        """Where the row of each choice begins in a flat table of rows by experts; add the expert."""
        return np.repeat(row.astype(np.int64) * self.n_experts, self.expert_ids.shape[2])

    def chosen(self, layer: int) -> Integer[np.ndarray, " nK"]:
        """Experts of the choices, by place of the layer among those read."""
        return self.expert_ids[:, layer].ravel()

    def observed(self, layer: int, owner_cells: Integer[np.ndarray, " nK"]) -> Float32[np.ndarray, "o E"]:
        """Choices that each owner made, with the `cells` of the owners."""
        n_owners = self.rows.stop - self.rows.start
        counts = np.bincount(owner_cells + self.chosen(layer), minlength=n_owners * self.n_experts)
        return counts.reshape(n_owners, self.n_experts).astype(np.float32)


def read_parts(run: Run, classified: Classified, layers: Sequence[int]) -> Iterator[Part]:
    """The tokens that count, one part of the run at a time."""
    held = [part.sequences for part in run.manifest.parts]
    bounds = np.searchsorted(classified.sequence, np.cumsum([0, *held]))
    for start, stop, batch in zip(bounds[:-1], bounds[1:], run.batches(layers=layers), strict=True):
        owner = classified.owner(batch)
        kept = owner >= 0
        owner, token = owner[kept], batch.token_id[kept]
        word = classified.word_of[classified.stratum[owner] * run.spec.vocab_size + token]
        rows = slice(int(start), int(stop))
        yield Part(rows, owner - start, word, batch.expert_ids[kept], classified.n_words, run.spec.n_experts)


def token_rates(run: Run, parts: Iterable[Part], n_words: int, n_layers: int) -> list[Float32[np.ndarray, "N E"]]:
    """For each layer of the parts of a run, how often a token of each class chooses each expert, over the whole run."""
    counts = [np.zeros(n_words * run.spec.n_experts, np.int32) for _ in range(n_layers)]
    tokens = np.zeros(n_words, np.float32)
    for part in parts:
        tokens += np.bincount(part.word, minlength=n_words)
        # In the order of their classes, tokens that follow each other count in the same place of a large table.
        order = np.argsort(part.word)
        cells = part.cells(part.word[order])
        for layer, table in enumerate(counts):
            np.add.at(table, cells + part.expert_ids[order, layer].ravel(), np.int32(1))
    rates = []
    while counts:
        rates.append(counts.pop(0).reshape(n_words, -1).astype(np.float32))
        rates[-1] /= np.maximum(tokens, 1)[:, None]
    return rates


def problem_share(
    residual: Float[np.ndarray, "o E"], sequence: Integer[np.ndarray, " o"], n_tokens: Float64[np.ndarray, " o"]
) -> Float[np.ndarray, "o E"]:
    """Each step's share of its problem's residual, by its part of the problem's tokens.

    Taking it out centres the whole-step permutation on 0 and keeps long steps from passing for special ones.
    """
    problem = sequence - sequence[:1]
    n_problems = int(problem.max(initial=0)) + 1
    part = n_tokens / np.maximum(np.bincount(problem, weights=n_tokens, minlength=n_problems)[problem], 1)
    return sum_by(residual, problem, n_problems)[problem] * part.astype(residual.dtype)[:, None]


@dataclass(frozen=True)
class Choices:
    """Choices of one layer's experts by each step or sequence."""

    observed: Float64[np.ndarray, "O E"]
    expected: Float64[np.ndarray, "O E"]
    """What its tokens, and for steps its problem, would make of them."""


def expected_choices(run: Run, layer: int, classified: Classified) -> Choices:
    """Choices of each step or sequence in one layer, and those to expect of it; memory holds all of them for that layer."""
    parts = list(read_parts(run, classified, [layer]))
    (rate,) = token_rates(run, parts, classified.n_words, 1)
    observed, expected = np.zeros((2, len(classified.codes), run.spec.n_experts))
    for part in parts:
        here = part.rows
        observed[here], expected[here] = part.observed(0, part.cells(part.owner)), part.words @ rate
        if classified.within_sequences:
            residual = observed[here] - expected[here]
            expected[here] += problem_share(residual, classified.sequence[here], classified.n_tokens[here])
    return Choices(observed, expected)


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
    # Labels keep their place in a solution, and routing drifts along it: without this, drift would pass for preference.
    place = PLACES * steps["step"].to_numpy() // np.bincount(sequence, minlength=len(run.sequences))[sequence]
    return _classified(run, "label", names, codes, sequence, families(run)[1][sequence] * PLACES + place, owner)


def classified_families(run: Run) -> Classified:
    """Sequences of a run by their family; only tokens of the completion count.

    Raises:
        UsageError: The run has fewer than two families, or no completions.
    """
    names, codes = families(run)
    if len(names) < 2:
        raise UsageError(f"one family only in this run ({names[0] or 'unnamed'}); comparing needs two")
    return _classified(run, "family", names, codes, np.arange(len(codes)), np.zeros_like(codes), _completions)


def classified_answers(run: Run) -> Classified:
    """Sequences of a run by whether their answer is right, of families that have both; only tokens of the completion count.

    Raises:
        UsageError: No family has both right and wrong answers, or the run has no completions.
    """
    _, family = families(run)
    correct = run.sequences["correct"]
    judged, right = correct.notna().to_numpy(), correct.fillna(value=False).to_numpy(dtype=bool)
    both = np.bincount(family[judged & right], minlength=family.max() + 1) > 0
    both &= np.bincount(family[judged & ~right], minlength=family.max() + 1) > 0
    kept = judged & both[family]
    if not kept.any():
        found = f"{int(right.sum())} right and {int((judged & ~right).sum())} wrong answers"
        raise UsageError(f"no family of this run has both right and wrong answers ({found} in all); comparing needs both")
    row = np.where(kept, np.cumsum(kept) - 1, -1)

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        return np.where(segment_mask(batch, COMPLETION), row[batch.sequence], -1)

    stratum = np.unique(family[kept], return_inverse=True)[1]
    codes = (~right[kept]).astype(np.int64)
    return _classified(run, "answer", np.array([RIGHT, WRONG]), codes, np.flatnonzero(kept), stratum, owner)


def families(run: Run) -> tuple[np.ndarray, Integer[np.ndarray, " S"]]:
    """Names of a run's families, sorted, and the family of each sequence.

    Raises:
        UsageError: The run holds no sequences.
    """
    require_sequences(run)
    names, codes = np.unique(run.sequences["family"].to_numpy(dtype=str), return_inverse=True)
    return names, codes


def _completions(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
    return np.where(segment_mask(batch, COMPLETION), batch.sequence, -1)


def _classified(
    run: Run,
    kind: str,
    names: np.ndarray,
    codes: Integer[np.ndarray, " O"],
    sequence: Integer[np.ndarray, " O"],
    stratum: Integer[np.ndarray, " O"],
    owner: Owner,
) -> Classified:
    n_tokens, seen = _seen(run, owner, stratum)
    if not n_tokens.any():
        raise UsageError("no completions in this run, prompts alone")
    word_of = np.where(seen, np.cumsum(seen) - 1, -1)
    return Classified(kind, tuple(map(str, names)), codes, sequence, stratum, owner, n_tokens, word_of)


def _seen(
    run: Run, owner: Owner, stratum: Integer[np.ndarray, " O"]
) -> tuple[Float64[np.ndarray, " O"], Bool[np.ndarray, " X"]]:
    """Tokens of each owner, and which token ids occur in which stratum."""
    n_tokens, seen = np.zeros(len(stratum)), np.zeros((int(stratum.max()) + 1) * run.spec.vocab_size, dtype=bool)
    for batch in run.batches(layers=[]):
        owners = owner(batch)
        kept = owners >= 0
        n_tokens += np.bincount(owners[kept], minlength=len(stratum))
        seen[stratum[owners[kept]] * run.spec.vocab_size + batch.token_id[kept]] = True
    return n_tokens, seen
