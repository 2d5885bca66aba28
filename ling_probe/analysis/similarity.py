"""Whether steps of one kind are routed alike, beyond their words, their place and their problem.

1. Give each step a profile in a layer: how often each expert was chosen there, per token; how often its tokens alone would make
   it so, as they choose in all steps of the family; and what is left of the first without the second.
2. Take the cosine of every pair of steps of a family, and the mean over pairs of one label minus that over pairs of two.
3. Do so at five levels, from the second on each keeping more equal than the one before:

       words     profiles that the tokens alone would make, pairs from different problems
       raw       profiles as they are, the same pairs
       token     what is left beyond the tokens, the same pairs
       position  of these the pairs that stand at the same place of their solutions
       problem   what is left beyond the tokens, pairs from the same problem

4. Shuffle labels over whole steps inside each problem, and see how often the difference is as large.

Large runs are sampled by whole problems: some for what tokens make of it, of these some to compare.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Float64, Integer

from ling_probe import stats
from ling_probe.analysis.classified import PLACES, Classified, classified_steps, expected_choices
from ling_probe.analysis.pairwise import drawn_means, shuffled_gaps
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, in_order, judge
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch

LEVELS = ("words", "raw", "token", "position", "problem")
STRICT = ("token", "position", "problem")
"""Levels at which tokens are equal."""
STEPS = 600
"""About so many steps of a run are compared, all with all."""
PROBLEMS = 1000
"""At most so many problems say what a token makes of it."""
LEAST_GAP = 0.02
"""Difference of mean cosines that is not worth having."""


def step_similarity(run: Run, *, permutations: int = 299, draws: int = 500, seed: int = 0) -> pd.DataFrame:
    """How much more alike steps of the same label are routed than steps of different labels of the family.

    One row a layer and level (see above): `same` and `different`, the mean cosines of the two kinds of pair, `gap` their
    difference with its 95 % bootstrap interval over problems, `p` from whole-step permutation inside each problem, `q`
    corrected over layers and levels, words and raw apart (Benjamini-Hochberg), `steps`, `problems` and `pairs` compared.

    Args:
        run: A run whose benchmark has step labels.
        permutations: Shuffles.
        draws: Bootstrap samples of the interval.
        seed: Of the sample, the shuffles and the bootstrap.

    Raises:
        UsageError: The run has no step labels, or one alone.
    """
    steps = _sampled(classified_steps(run), seed)
    if len(steps.names) < 2:
        raise UsageError(f'every step of this run is "{steps.names[0]}"; comparing needs two labels')
    sample = _Sample.of(steps, seed)
    shuffled = stats.permute_labels(sample.codes, blocks=sample.sequence, draws=permutations, seed=seed)
    weights = stats.bootstrap_weights(int(sample.sequence.max()) + 1, draws=draws, seed=seed)
    rows = []
    for layer in run.spec.routed_layers:
        choices = expected_choices(run, layer, steps)
        tokens = steps.n_tokens[sample.rows, None]
        raw = _unit((choices.observed[sample.rows] / tokens).astype(np.float32))
        words = _unit((choices.expected[sample.rows] / tokens).astype(np.float32))
        left = _unit(((choices.observed - choices.expected)[sample.rows] / tokens).astype(np.float32))
        for level in LEVELS:
            profiles = {"words": words, "raw": raw}.get(level, left)
            cosine = profiles @ profiles.T
            rows.append({"layer": layer, "level": level} | sample.compare(cosine, level, shuffled, weights))
    table = pd.DataFrame(rows).assign(seed=seed)
    # Words differ between labels nearly always: corrected with them, what is left beyond them would pass too easily.
    strict = table["level"].isin(STRICT).to_numpy()
    q = np.where(strict, stats.benjamini_hochberg(table["p"].where(strict).to_numpy()), np.nan)
    table.insert(len(table.columns) - 1, "q", np.where(strict, q, stats.benjamini_hochberg(table["p"].mask(strict).to_numpy())))
    return table


def _sampled(steps: Classified, seed: int) -> Classified:
    """The same steps, with those of problems that are not drawn left without tokens."""
    problems = np.unique(steps.sequence)
    if len(problems) <= PROBLEMS:
        return steps
    drawn = np.zeros(int(problems[-1]) + 1, dtype=bool)
    drawn[np.random.default_rng(seed).choice(problems, PROBLEMS, replace=False)] = True
    kept = drawn[steps.sequence]

    def owner(batch: TokenBatch) -> Integer[np.ndarray, " N"]:
        own = steps.owner(batch)
        return np.where((own >= 0) & kept[np.maximum(own, 0)], own, -1)

    return replace(steps, owner=owner, n_tokens=np.where(kept, steps.n_tokens, 0))


@dataclass(frozen=True)
class _Sample:
    """The n steps that are compared."""

    rows: Integer[np.ndarray, " n"]
    codes: Integer[np.ndarray, " n"]
    sequence: Integer[np.ndarray, " n"]
    """Problem of each, numbered from 0 without gaps."""
    family: Integer[np.ndarray, " n"]
    place: Integer[np.ndarray, " n"]
    """Its place among the steps of its problem."""

    @classmethod
    def of(cls, steps: Classified, seed: int) -> "_Sample":
        """Steps with tokens, of whole problems drawn at random until there are enough."""
        held = np.flatnonzero(steps.n_tokens > 0)
        order = np.random.default_rng(seed).permutation(np.unique(steps.sequence[held]))
        sizes = np.bincount(steps.sequence[held], minlength=int(order.max()) + 1)[order]
        drawn = order[: int(np.searchsorted(np.cumsum(sizes), STEPS)) + 1]
        rows = held[np.isin(steps.sequence[held], drawn)]
        first = np.searchsorted(steps.sequence, steps.sequence[rows])
        problem = np.unique(steps.sequence[rows], return_inverse=True)[1]
        return cls(rows, steps.codes[rows], problem, steps.stratum[rows] // PLACES, rows - first)

    def compare(
        self,
        cosine: Float32[np.ndarray, "n n"],
        level: str,
        shuffled: Integer[np.ndarray, "B n"],
        weights: Float64[np.ndarray, "D P"],
    ) -> dict[str, float]:
        """The columns of one level."""
        paired = self._pairs(level)
        same = paired & (self.codes[:, None] == self.codes)
        if not same.any() or not (paired & ~same).any():
            return {"same": np.nan, "different": np.nan, "gap": np.nan, "ci_low": np.nan, "ci_high": np.nan, "p": np.nan} | (
                self._sizes(paired)
            )
        means = _mean(cosine, same), _mean(cosine, paired & ~same)
        gap = means[0] - means[1]
        drawn = [drawn_means(cosine, pairs, self.sequence, weights) for pairs in (same, paired & ~same)]
        low, high = stats.percentile_interval(drawn[0] - drawn[1])
        null = np.array(list(shuffled_gaps(np.where(paired, cosine, 0), paired, shuffled)))
        exceeding = (np.abs(null - null.mean()) >= abs(gap - null.mean()) - 1e-9).sum()
        p = float(stats.permutation_p(exceeding, len(null)))
        found = {"same": means[0], "different": means[1], "gap": gap, "ci_low": float(low), "ci_high": float(high), "p": p}
        return found | self._sizes(paired)

    def _pairs(self, level: str) -> Bool[np.ndarray, "n n"]:
        family = self.family[:, None] == self.family
        problem = self.sequence[:, None] == self.sequence
        if level == "problem":
            return family & problem & ~np.eye(len(self.codes), dtype=bool)
        place = self.place[:, None] == self.place if level == "position" else True
        return family & ~problem & place

    def _sizes(self, paired: Bool[np.ndarray, "n n"]) -> dict[str, float]:
        return {"steps": len(self.codes), "problems": int(self.sequence.max()) + 1, "pairs": int(paired.sum()) // 2}


def _unit(profiles: Float32[np.ndarray, "n E"]) -> Float32[np.ndarray, "n E"]:
    return profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), np.float32(1e-9))


def _mean(values: Float32[np.ndarray, "n n"], where: Bool[np.ndarray, "n n"]) -> float:
    return float(values[where].mean(dtype=float)) if where.any() else np.nan


def _finding(table: pd.DataFrame) -> Finding:
    kept = table[table["level"] == "position"]
    if kept["gap"].isna().all():
        alone = "At the same place of a solution no two steps of one label, or none of two labels, can be compared: "
        return Finding(sentence=f"{alone}label and place cannot be told apart.", verdict=Verdict.CANNOT_TELL, rung=0)
    row = kept.sort_values("ci_low", ascending=False, na_position="last").iloc[0]
    gap = table[table["layer"] == row["layer"]].set_index("level")["gap"].to_dict()
    sure = table[(table["q"] < DISCOVERY) & (table["ci_low"] > 0)]["level"].value_counts()
    verdict = judge(row["ci_low"], row["ci_high"], q=row["q"], least=LEAST_GAP)
    return Finding(
        sentence=(
            f"In layer {row['layer']} steps of one label are routed more alike than steps of two by a cosine of "
            f"{gap['raw']:.3f}, where their tokens alone would make it {gap['words']:.3f}. What is left beyond the tokens "
            f"differs by {gap['token']:.3f}, at the same place of the solution by {row['gap']:.3f} (95 % interval "
            f"{row['ci_low']:.3f} to {row['ci_high']:.3f}), in one problem by {gap['problem']:.3f}. Of {len(kept)} layers "
            f"{sure.get('position', 0)} keep a difference at equal tokens and place, {sure.get('problem', 0)} in one problem."
        ),
        verdict=verdict,
        rung=3 if verdict is Verdict.SUPPORTED else 0,
        effect=float(row["gap"]),
        unit="cosine",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
    )


STEP_SIMILARITY = Analysis(
    function=step_similarity,
    question="Are steps of one kind routed alike, beyond their words, place and problem?",
    claim="Steps of one label are routed more alike than steps of different labels, at equal tokens and place.",
    method=(
        "Mean cosine of expert profiles over pairs of steps of one label minus pairs of two, in the same family: raw, beyond "
        "the tokens, at the same place of the solution, inside one problem. Null: labels shuffled over whole steps inside each "
        "problem; corrected over layers and these levels (Benjamini-Hochberg); intervals from a bootstrap over problems."
    ),
    order=in_order,
    finding=_finding,
)
