"""From the table of an analysis to a part of a claim: whether one thing is so."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats as distributions

from ling_probe import metrics
from ling_probe.analysis import finding
from ling_probe.analysis.asking import Answer
from ling_probe.analysis.decoders import ALL, TEXT, TOKENS
from ling_probe.analysis.information import BIGRAM, LEAST_COMPARED
from ling_probe.analysis.information import LEAST_EFFECT as LEAST_BITS
from ling_probe.analysis.overlap import LEAST_EFFECT as LEAST_OVERLAP
from ling_probe.analysis.overlap import SAME_BIGRAM, SAME_ELSEWHERE
from ling_probe.analysis.question import fold, judge_gain, layer_means, percent
from ling_probe.analysis.specialisation import LEAST_EFFECT as LEAST_RATIO
from ling_probe.claims.claim import ClaimVerdict, Part
from ling_probe.errors import UsageError
from ling_probe.run import Run

MOST_CONCENTRATED = 2.0
"""Times its even share that the K busiest experts of a layer may carry together."""
LEAST_EXPECTED = 20
"""Choices an expert must have been due for its having none to mean something."""
MOST_DEAD = 0.05
"""Share of experts that may be dead."""
LEAST_DEPTH = 0.02
"""Gini by which shallow layers must be less even than deep ones for it to be worth telling."""
LEAST_ROOM = 0.1
"""Bits that words and place must leave to be told before a decoder can be asked to tell some of them."""


Judged = Callable[["Asked", pd.DataFrame, Run], Part]
"""From the table of a part's source to the part."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A part before it is answered."""

    source: str
    statement: str
    judged: Judged
    decides: bool = True

    def part(self, answer: Answer | None, run: Run) -> Part:
        """The part, from an answer, a refusal, or nothing where the source was not asked."""
        if answer is None:
            answer = UsageError(f"{self.source} was not asked for")
        if isinstance(answer, UsageError):
            return self.untested(str(answer))
        return self.judged(self, answer, run)

    def untested(self, why: str) -> Part:
        """Not tested, and why."""
        return Part(
            source=self.source,
            statement=self.statement,
            verdict=ClaimVerdict.NOT_TESTED,
            reason=f"Not tested: {why.removesuffix('.')}.",
            decides=self.decides,
        )

    def answered(self, verdict: ClaimVerdict, reason: str, **numbers: object) -> Part:
        """Tested."""
        head = {"source": self.source, "statement": self.statement, "verdict": verdict, "reason": reason}
        return Part(**({"decides": self.decides} | head | numbers))  # type: ignore[arg-type]


def found(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """As the analysis itself finds."""
    told = finding(asked.source, table)
    names = ("effect", "unit", "ci_low", "ci_high", "q", "rung")
    numbers = {name: getattr(told, name) for name in names}
    return asked.answered(ClaimVerdict.of(told.verdict), told.sentence, n=_problems(table, run), **numbers)


def replicated(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """As the analysis finds, and an effect picked on one half of the problems is surely worth having on the other."""
    if not table["p"].count():
        return asked.untested(
            "no two kinds of step of this run can be compared: they share no words, or there is one kind alone"
        )
    part, again = found(asked, table, run), table[table["replicated"]]
    if part.verdict is not ClaimVerdict.HOLDS:
        return part
    if again.empty:
        reason = f"{part.reason} None was picked on one half of the problems and held on the other."
        return replace(part, verdict=ClaimVerdict.CANNOT_TELL, reason=reason)
    large = int(((again["held_out_low"] > LEAST_RATIO) | (again["held_out_high"] < -LEAST_RATIO)).sum())
    small = bool(((again["held_out_low"] > -LEAST_RATIO) & (again["held_out_high"] < LEAST_RATIO)).all())
    verdict = ClaimVerdict.HOLDS if large else ClaimVerdict.FAILS if small else ClaimVerdict.CANNOT_TELL
    told = f"On the half they were not picked on, {large:,} are surely {fold(LEAST_RATIO)} times as often, or as seldom."
    return replace(part, verdict=verdict, reason=f"{told} {part.reason}")


def worth(judged: Judged, least: float) -> Judged:
    """The same, but an effect that is surely there and surely below what is worth having does not hold.

    The least attention mixes some context into every router: with enough tokens every part about it would hold.
    """

    def large_enough(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
        part = judged(asked, table, run)
        if part.verdict is ClaimVerdict.HOLDS and part.ci_high < least:
            reason = f"{part.reason} This is there, and next to nothing: below {least:g}."
            return replace(part, verdict=ClaimVerdict.FAILS, reason=reason)
        return part

    return large_enough


def about_labels(judged: Judged) -> Judged:
    """The same, where the table is about labels of steps; a run without any is told about families instead."""

    def labels_alone(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
        if (table["about"] != "label").all():
            return asked.untested("the run has no labels of steps")
        return judged(asked, table, run)

    return labels_alone


def room_to_decode(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """As the decoder finds; where words and place leave next to nothing to tell, it decides nothing."""
    part = found(asked, table, run)
    told = table[table["about"] == table["about"].iloc[0]].set_index("features")
    left = float(told.loc[ALL, "entropy"] - max(told.loc[name, "bits"] for name in (TOKENS, TEXT)))
    if left >= LEAST_ROOM:
        return part
    reason = f"Words and place leave {max(left, 0.0):.2f} bits of the label to tell: too few to ask routing for. {part.reason}"
    return replace(part, verdict=ClaimVerdict.CANNOT_TELL, reason=reason, decides=False)


def beyond_neighbours(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Bits about the label, or else the family, that are left once the token and the one before it are given."""
    about = table["about"].iloc[0]
    mean = table[table["layer"].isna() & (table["about"] == about) & (table["given"] == BIGRAM)].iloc[0]
    verdict = ClaimVerdict.of(judge_gain(mean["ci_low"], mean["ci_high"], least=LEAST_BITS, q=float(mean["p"])))
    if verdict is ClaimVerdict.FAILS and mean["compared"] < LEAST_COMPARED:
        verdict = ClaimVerdict.CANNOT_TELL
    name = {"label": "step label", "family": "family", "correct": "answer being right"}[about]
    return asked.answered(
        verdict,
        f"Given the token and the one before it, a layer's experts tell {mean['bits']:.3f} bits about the {name} (95 % "
        f"interval {mean['ci_low']:.3f} to {mean['ci_high']:.3f}, p {mean['p']:.3g}); {percent(mean['compared'])} of tokens "
        "have company of another kind there.",
        effect=mean["bits"], unit="bits per token, mean over layers", ci_low=mean["ci_low"], ci_high=mean["ci_high"],
        q=mean["q"], rung=2 if verdict is ClaimVerdict.HOLDS else 0, n=_problems(table, run),
    )  # fmt: skip


def context_of_a_token(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Overlap of two occurrences of a token after the same token, less that after others, in the layer with least of it."""
    alike, other = (table[table["pair"] == name].set_index("layer") for name in (SAME_BIGRAM, SAME_ELSEWHERE))
    gaps = pd.DataFrame(
        {
            "gap": alike["jaccard"] - other["jaccard"],
            "low": alike["ci_low"] - other["ci_high"],
            "high": alike["ci_high"] - other["ci_low"],
            "elsewhere": other["jaccard"],
        }
    ).dropna()
    if gaps.empty:
        return asked.untested("no token occurs twice after the same token and twice after others")
    layer, row = _least(gaps, "low")
    verdict = ClaimVerdict.of(judge_gain(row["low"], row["high"], least=LEAST_OVERLAP))
    return asked.answered(
        verdict,
        f"Least in layer {layer}: two occurrences of a token share {row['gap']:+.3f} more (Jaccard index; {row['low']:+.3f} "
        f"to {row['high']:+.3f} by the intervals of both) where the same token stands before both than "
        f"where others do, beside {row['elsewhere']:.3f} for the token alone.",
        effect=row["gap"], unit="Jaccard index, weakest layer", ci_low=row["low"], ci_high=row["high"],
        rung=1 if verdict is ClaimVerdict.HOLDS else 0, n=_problems(table, run),
    )  # fmt: skip


def busiest(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Share of the K busiest experts of a layer over their even share, in the layer where it is the highest."""
    spec = run.spec
    even, top = spec.top_k / spec.n_experts, table.groupby("layer")["load"].nlargest(spec.top_k).reset_index(level=0)
    rows = table.loc[top.index]
    sums = rows.groupby("layer")[["load", "ci_low", "ci_high"]].sum() / even
    layer, row = _least(-sums, "load")
    times, low, high = (-row[name] for name in ("load", "ci_low", "ci_high"))
    tokens = int(table.loc[table["layer"] == layer, "count"].sum()) // spec.top_k
    floor = metrics.balanced_loads(
        spec.n_experts, spec.top_k, tokens, n_groups=spec.n_groups, topk_groups=spec.topk_groups, seed=0
    )
    floor_times = float(np.sort(floor, axis=1)[:, -spec.top_k :].sum(axis=1).mean() / even)
    return asked.answered(
        judge_below(low, high, MOST_CONCENTRATED),
        f"Most in layer {layer}: the {spec.top_k} busiest of {spec.n_experts} experts carry {times:.2f} times their even "
        f"share ({percent(times * even)} of choices; {low:.2f} to {high:.2f} by the experts' intervals), where a balanced "
        "router "
        f"would show {floor_times:.2f} after as many tokens; {MOST_CONCENTRATED:g} is too much.",
        effect=times, unit="times the even share, most concentrated layer", ci_low=low, ci_high=high, rung=1,
        n=len(run.sequences),
    )  # fmt: skip


def dead_experts(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Share of experts that no token chose."""
    whole = table[table["family"] == "all"]
    due = float(whole["tokens"].iloc[0]) * run.spec.top_k / run.spec.n_experts
    n = len(whole) * run.spec.n_experts
    dead = int(whole["dead"].sum())
    verdict = ClaimVerdict.FAILS if dead / n > MOST_DEAD else ClaimVerdict.HOLDS
    return asked.answered(
        ClaimVerdict.CANNOT_TELL if due < LEAST_EXPECTED else verdict,
        f"{dead} of {n} experts were never chosen in {int(whole['tokens'].iloc[0]):,} tokens, where each was due {due:,.0f} "
        f"choices; {percent(MOST_DEAD)} is too many, and fewer than {LEAST_EXPECTED} due tell nothing.",
        effect=dead / n, unit="share of experts", rung=1, n=len(run.sequences),
    )  # fmt: skip


def evenness(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Entropy, Gini and MaxVio of the least even layer and the least even family; shown, decides nothing."""
    whole = table[table["family"] == "all"]
    row = whole.iloc[int(np.argmax(whole["gini"]))]
    families = table[table["family"] != "all"]
    told = ""
    if len(families):
        worst = families.iloc[int(np.argmax(families["gini"]))]
        told = f" Of a single family, {worst['family']} is the least even (Gini {worst['gini']:.3f}, layer {worst['layer']})."
    return asked.answered(
        ClaimVerdict.of(finding("load_balance", table).verdict),
        f"Least even in layer {row['layer']}: entropy {percent(row['entropy'])} of its maximum, Gini {row['gini']:.3f} (95 % "
        f"interval {row['ci_low']:.3f} to {row['ci_high']:.3f}; balanced {row['gini_floor']:.3f}), MaxVio "
        f"{row['max_vio']:.2f} (balanced {row['max_vio_floor']:.2f}).{told}",
        effect=row["gini"] - row["gini_floor"], unit="Gini above a balanced router", ci_low=row["ci_low"] - row["gini_floor"],
        ci_high=row["ci_high"] - row["gini_floor"], rung=1, n=len(run.sequences),
    )  # fmt: skip


def shallow_less_even(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Mean Gini of the shallow half of the routed layers less that of the deep half."""
    whole = table[table["family"] == "all"].sort_values("layer")
    if len(whole) < 2:
        return asked.untested("the model has one routed layer")
    half = len(whole) // 2
    names = ("gini", "ci_low", "ci_high")
    (shallow, s_low, s_high), (deep, d_low, d_high) = (
        layer_means(whole.head(half), *names),
        layer_means(whole.tail(half), *names),
    )
    low, high = s_low - d_high, s_high - d_low
    even = np.ptp(whole["cv"]) == 0
    rank = np.nan if even else float(distributions.spearmanr(whole["layer"], whole["cv"]).statistic)
    return asked.answered(
        ClaimVerdict.of(judge_gain(low, high, least=LEAST_DEPTH)),
        f"Mean Gini {shallow:.3f} in the {half} shallowest routed layers and {deep:.3f} in the {half} deepest: "
        f"{shallow - deep:+.3f} ({low:+.3f} to {high:+.3f} by the layers' intervals). Depth and variation of the load: rank "
        f"correlation {rank:+.2f} over {len(whole)} layers.",
        effect=shallow - deep, unit="Gini, shallow less deep", ci_low=low, ci_high=high, rung=1, n=len(run.sequences),
    )  # fmt: skip


def experts_a_token(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Recorded choices over tokens, which must be K in every layer."""
    layers = table.groupby("layer")["count"].sum()
    tokens = sum(part.tokens for part in run.manifest.parts)
    each = layers / max(tokens, 1)
    same = bool((layers == tokens * run.spec.top_k).all())
    added = 2 * run.spec.d_model
    return asked.answered(
        ClaimVerdict.HOLDS if same else ClaimVerdict.FAILS,
        f"Each of {tokens:,} tokens chose {each.min():g} to {each.max():g} of {run.spec.n_experts} experts in every one of "
        f"{len(layers)} layers; the rule says {run.spec.top_k}. One more expert in a layer adds its row of the router, 2·D = "
        f"{added:,} FLOPs a token, and nothing else.",
        effect=float(each.mean()), unit="experts a token and layer", ci_low=float(each.min()), ci_high=float(each.max()),
        rung=0, n=tokens, n_of="tokens",
    )  # fmt: skip


def preferring_bias(asked: Asked, table: pd.DataFrame, run: Run) -> Part:
    """Whether the bias works against affinity, as what balances must."""
    part = found(asked, table, run)
    with_affinity = part.verdict is ClaimVerdict.HOLDS and not part.ci_high < 0
    return replace(part, verdict=ClaimVerdict.FAILS) if with_affinity else part


def _least(table: pd.DataFrame, column: str) -> tuple[int, dict[str, float]]:
    """Index and numbers of the row with the lowest value."""
    place = int(np.argmin(table[column]))
    return int(table.index[place]), {str(name): float(value) for name, value in table.iloc[place].items()}


def judge_below(low: float, high: float, most: float) -> ClaimVerdict:
    """Whether a number is surely below another."""
    if high < most:
        return ClaimVerdict.HOLDS
    return ClaimVerdict.FAILS if low > most else ClaimVerdict.CANNOT_TELL


def _problems(table: pd.DataFrame, run: Run) -> int:
    """Problems that an analysis counted; those of the run where it does not say."""
    for name in ("problems", "sequences"):
        if name in table.columns:
            return int(table[name].max())
    return len(run.sequences)
