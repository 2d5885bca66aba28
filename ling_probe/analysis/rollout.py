"""Whether a model uses its experts otherwise while it reads the prompt than in the completion, beyond the words of either.

Prompts and completions are written in other words, and routing follows words: their loads differ for that alone. At equal
tokens, each token id of a sequence counts on both sides with the same weight, n_p n_c / (n_p + n_c) of its n_p occurrences in
the prompt and n_c in the completion; an id that the sequence has on one side only says nothing. So both sides of every sequence
hold the same words in the same proportions, of the same problem, and only their place differs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Integer

from ling_probe import stats
from ling_probe.analysis.contrast import Divergence, LoadContrast
from ling_probe.analysis.counting import require_sequences
from ling_probe.analysis.question import DISCOVERY, Analysis, Finding, Verdict, in_order, judge
from ling_probe.errors import UsageError
from ling_probe.run import Run, TokenBatch
from ling_probe.trace import SEGMENTS

LEAST_EFFECT = 0.01
"""Divergence in bits below which a difference is not worth having: experts that do about a quarter more or less."""
LEAST_OVERLAP = 0.1
"""With less of the tokens to compare there is no effect at equal tokens: the words give the side away."""
_SIDE = np.full(len(SEGMENTS), -1)
_SIDE[[SEGMENTS.index("prompt"), SEGMENTS.index("reasoning"), SEGMENTS.index("answer")]] = 0, 1, 1


def prompt_rollout(run: Run, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How far the loads of prompt and completion lie apart in each layer, as they are and at equal tokens.

    One row a layer: `sequences`, `prompt_tokens`, `completion_tokens` (reasoning and answer); `raw_divergence`, the
    Jensen-Shannon divergence of the two loads in bits, less its bias, with its 95 % bootstrap interval over sequences
    (`raw_low`, `raw_high`); `divergence`, the same at equal tokens (`ci_low`, `ci_high`), `p` from exchanging prompt and
    completion within sequences (sign flips), and `q` corrected over the layers (Benjamini-Hochberg). `overlap` is the weight of
    the tokens that both sides of a sequence have, 1 where they have the same in the same proportions; below a tenth there is no
    effect and no test.

    Args:
        run: A run with prompts and completions.
        draws: Bootstrap samples.
        seed: Of samples and flips.

    Raises:
        UsageError: The run has no prompt tokens, or no completions.
    """
    require_sequences(run)
    unit = stats.bundles(len(run.sequences), seed=seed)
    sides = measure_sides(run, unit)
    if not sides.tokens.all():
        side = "prompts" if sides.tokens[1] else "completions"
        raise UsageError(f"{run.folder} has no tokens of {side}; capture a benchmark with solutions, or with --generate")
    weights = stats.bootstrap_weights(sides.plain.shape[2], draws=draws, seed=seed)
    facts = {
        "sequences": len(run.sequences),
        "prompt_tokens": int(sides.tokens[0]),
        "completion_tokens": int(sides.tokens[1]),
        "overlap": sides.overlap,
    }
    rows = [
        {"layer": layer}
        | facts
        | _row(LoadContrast(*sides.plain[row]).divergence(weights, seed=seed), _equal(sides, row, weights, seed))
        for row, layer in enumerate(run.spec.routed_layers)
    ]
    table = pd.DataFrame(rows)
    return table.assign(q=stats.benjamini_hochberg(table["p"].to_numpy(float)), seed=seed)


@dataclass
class Sides:
    """Choices by layer, side (prompt, completion), bundle of sequences and expert."""

    plain: Float64[np.ndarray, "M 2 U E"]
    equal: Float64[np.ndarray, "M 2 U E"]
    """With the weight of their token."""
    tokens: Float64[np.ndarray, " 2"]
    common: float = 0.0
    """Weight of the tokens that both sides of a sequence have."""
    most: float = 0.0
    """What it would be if both sides had the same in the same proportions."""

    @property
    def overlap(self) -> float:
        """One as a share of the other."""
        return self.common / self.most if self.most else 0.0


def measure_sides(run: Run, unit: Integer[np.ndarray, " S"]) -> Sides:
    """Stream the run once; `unit` is the bundle of each sequence."""
    n_units, spec = int(unit.max()) + 1, run.spec
    size = 2 * n_units * spec.n_experts
    plain, equal = np.zeros((2, spec.n_rows, size))
    shape = (spec.n_rows, 2, n_units, spec.n_experts)
    sides = Sides(plain.reshape(shape), equal.reshape(shape), np.zeros(2))
    for batch in run.batches():
        side = _SIDE[batch.segment]
        kept = np.flatnonzero(side >= 0)
        side = side[kept]
        weight = _add_weights(sides, batch, kept, side)
        heavy, heavy_weight = weight > 0, np.repeat(weight[weight > 0], spec.top_k)
        first = ((side * n_units + unit[batch.sequence[kept]]) * spec.n_experts)[:, None]
        for row in range(spec.n_rows):
            cells = first + batch.expert_ids[kept, row]
            plain[row] += np.bincount(cells.ravel(), minlength=size)
            equal[row] += np.bincount(cells[heavy].ravel(), weights=heavy_weight, minlength=size)
    return sides


def _add_weights(
    sides: Sides, batch: TokenBatch, kept: Integer[np.ndarray, " N"], side: Integer[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Weight of each token: of its stratum, a token id of a sequence, shared among the tokens of the side."""
    key = batch.sequence[kept].astype(np.int64) << 32 | batch.token_id[kept]
    _, stratum = np.unique(key, return_inverse=True)
    counts = _by_side(stratum, side)
    common = counts.prod(axis=0) / counts.sum(axis=0)
    _, sequence = np.unique(batch.sequence[kept], return_inverse=True)
    lengths = _by_side(sequence, side)
    sides.common += common.sum()
    sides.most += (lengths.prod(axis=0) / lengths.sum(axis=0)).sum()
    sides.tokens += lengths.sum(axis=1)
    return common[stratum] / counts[side, stratum]


def _by_side(group: Integer[np.ndarray, " N"], side: Integer[np.ndarray, " N"]) -> Float64[np.ndarray, "2 n"]:
    n = int(group.max(initial=-1)) + 1
    return np.stack([np.bincount(group[side == each], minlength=n) for each in (0, 1)]).astype(float)


def _equal(sides: Sides, row: int, weights: Float64[np.ndarray, "B U"], seed: int) -> Divergence:
    if sides.overlap < LEAST_OVERLAP:
        return Divergence(raw=np.nan, bias=np.nan, ci_low=np.nan, ci_high=np.nan, p=np.nan)
    return LoadContrast(*sides.equal[row]).divergence(weights, seed=seed)


def _row(raw: Divergence, equal: Divergence) -> dict[str, float]:
    return {
        "raw_divergence": raw.net,
        "raw_low": raw.ci_low,
        "raw_high": raw.ci_high,
        "divergence": equal.net,
        "ci_low": equal.ci_low,
        "ci_high": equal.ci_high,
        "p": equal.p,
    }


def _finding(table: pd.DataFrame) -> Finding:
    tested = table[table["p"].notna()]
    raw = table.iloc[int(np.argmax(table["raw_divergence"]))]
    told = (
        f"Loads of {raw['prompt_tokens']:.0f} prompt and {raw['completion_tokens']:.0f} completion tokens differ most in layer "
        f"{raw['layer']:.0f}, by {raw['raw_divergence']:.3f} bits"
    )
    if tested.empty:
        nothing = f"{told}, but the two sides share too few words (overlap {raw['overlap']:.2f}) to tell it from the words."
        return Finding(sentence=nothing, verdict=Verdict.CANNOT_TELL, rung=1)
    row = tested.iloc[int(np.argmax(tested["divergence"]))]
    found = int(((tested["q"] < DISCOVERY) & (tested["ci_low"] > 0)).sum())
    return Finding(
        sentence=(
            f"{told}; at equal tokens layer {row['layer']:.0f} does, by {row['divergence']:.3f} bits (95 % interval "
            f"{row['ci_low']:.3f} to {row['ci_high']:.3f}), and {found} of {len(tested)} layers differ (q below 0.05)."
        ),
        verdict=judge(row["ci_low"], row["ci_high"], least=LEAST_EFFECT, q=row["q"]),
        rung=3 if found else 0,
        effect=float(row["divergence"]),
        unit="bits",
        ci_low=float(row["ci_low"]),
        ci_high=float(row["ci_high"]),
        q=float(row["q"]),
        token_effect=float(row["raw_divergence"] - row["divergence"]),
    )


PROMPT_ROLLOUT = Analysis(
    function=prompt_rollout,
    question="Does the model use its experts otherwise in the completion than in the prompt?",
    claim="In some layer prompt and completion use the experts differently, at equal tokens.",
    method=(
        "Jensen-Shannon divergence of the two loads in bits, each token id of a sequence with the same weight on both sides, "
        "less what random signs make of it. Null: prompt and completion exchanged within sequences; p corrected over layers "
        "(Benjamini-Hochberg); intervals from a bootstrap over sequences."
    ),
    order=in_order,
    finding=_finding,
)
