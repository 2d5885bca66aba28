"""How well a model solves a benchmark, and how evenly it uses its experts while it does."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ling_probe import metrics
from ling_probe.benchmarks import Record
from ling_probe.capture import capture
from ling_probe.model.load import LoadedLing
from ling_probe.stats import wilson_interval
from ling_probe.trace import RoutingTrace


@dataclass(frozen=True)
class Evaluation:
    """Two tables of one pass over a benchmark."""

    accuracy: pd.DataFrame
    """family, problems, correct, share, ci_low, ci_high (Wilson, 95 %), step_share (correct among judged steps),
    first_wrong (mean 0-based step of the first wrong one, NaN if none), unfinished (texts that did not end)."""
    balance: pd.DataFrame
    """layer, tokens, max_vio, entropy, dead: the load over prompts and completions together."""


def evaluate(
    loaded: LoadedLing, records: Iterable[Record], *, max_new_tokens: int = 200, batch_tokens: int = 8192
) -> Evaluation:
    """Complete every prompt greedily and compare the answers letter by letter.

    Args:
        loaded: The model.
        records: Problems with answers.
        max_new_tokens: Longest completion.
        batch_tokens: Padded tokens of one forward pass.
    """
    counts = np.zeros((loaded.spec.n_rows, loaded.spec.n_experts), dtype=np.int64)
    rows = []
    end = loaded.tokenizer.eos_token_id
    for trace in capture(loaded, records, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, keep=("experts",)):
        for row in range(loaded.spec.n_rows):
            counts[row] += np.bincount(trace.expert_ids[:, row].ravel(), minlength=loaded.spec.n_experts)
        rows.append(_judge(trace, end))
    problems = pd.DataFrame(rows)
    families = [(str(family), part) for family, part in problems.groupby("family")]
    if len(families) > 1:
        families.append(("all", problems))
    return Evaluation(pd.DataFrame([_share(family, part) for family, part in families]), _balance(loaded, counts))


def _judge(trace: RoutingTrace, end: int | None) -> dict[str, Any]:
    judged = [step.correct for step in trace.steps if step.correct is not None]
    return {
        "family": trace.family,
        "correct": bool(trace.correct),
        "steps": len(judged),
        "steps_correct": sum(judged),
        "first_wrong": judged.index(False) if False in judged else np.nan,
        "finished": trace.token_ids[-1] == end,
    }


def _share(family: str, problems: pd.DataFrame) -> dict[str, Any]:
    correct, total = int(problems["correct"].sum()), len(problems)
    low, high = wilson_interval(correct, total)
    steps = int(problems["steps"].sum())
    return {
        "family": family,
        "problems": total,
        "correct": correct,
        "share": correct / total,
        "ci_low": low,
        "ci_high": high,
        "step_share": problems["steps_correct"].sum() / steps if steps else np.nan,
        "first_wrong": problems["first_wrong"].mean(),
        "unfinished": int((~problems["finished"]).sum()),
    }


def _balance(loaded: LoadedLing, counts: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": loaded.spec.routed_layers,
            "tokens": counts.sum(axis=1) // loaded.spec.top_k,
            "max_vio": metrics.max_vio(counts),
            "entropy": metrics.load_entropy(counts),
            "dead": metrics.dead_experts(counts),
        }
    )
