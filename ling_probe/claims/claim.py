"""What a claim is: a statement about a model, the parts it rests on, and one verdict by a rule that is written down.

The rule: a claim is as good as the weakest of the parts that decide. From weak to strong a part does not hold, was not tested,
cannot be told, or holds. Parts that do not decide are shown beside it. No p is corrected over the parts: each must hold, so
asking for more of them can only make a claim harder to keep.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from ling_probe.analysis import Verdict

RULE = (
    "As the weakest of the parts that decide: one that does not hold refutes the claim, one that was not tested or cannot be "
    "told leaves it open, and it holds if all of them hold."
)


class ClaimVerdict(StrEnum):
    """What the evidence says about a claim; from the weakest to the strongest."""

    FAILS = "does not hold"
    NOT_TESTED = "not tested"
    CANNOT_TELL = "cannot tell"
    HOLDS = "holds"

    @classmethod
    def of(cls, verdict: Verdict) -> "ClaimVerdict":
        """That of an analysis, in the words of claims."""
        return {
            Verdict.SUPPORTED: cls.HOLDS,
            Verdict.NOT_SUPPORTED: cls.FAILS,
            Verdict.CANNOT_TELL: cls.CANNOT_TELL,
            Verdict.NOT_APPLICABLE: cls.NOT_TESTED,
        }[verdict]


WEAKEST_FIRST = tuple(ClaimVerdict)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement that a claim rests on."""

    source: str
    """Analysis, or study of the model, that it is read from."""
    statement: str
    """What must be so."""
    verdict: ClaimVerdict
    reason: str
    """In a sentence, with the numbers; or why there are none."""
    decides: bool = True
    """Whether the claim's verdict rests on it."""
    rung: int | None = None
    """Of the ladder of evidence, as `analysis.question` has it."""
    effect: float = np.nan
    unit: str = ""
    ci_low: float = np.nan
    ci_high: float = np.nan
    q: float = np.nan
    n: int = 0
    """Of `n_of`."""
    n_of: str = "problems"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; null for what there is none of."""
        return _plain(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement made of Ling 2.0, and what one run says about it."""

    number: int
    key: str
    """Short name."""
    statement: str
    measure: str
    """What is measured, with its formula."""
    null: str
    """What it is compared with."""
    would_change: str
    """What would change the verdict."""
    command: str
    """What tests it further."""
    parts: tuple[Part, ...]

    @property
    def deciding(self) -> tuple[Part, ...]:
        """Parts that the verdict rests on."""
        return tuple(part for part in self.parts if part.decides)

    @property
    def weakest(self) -> Part:
        """The deciding part with the weakest verdict; among equals that with the lowest rung, then the first."""
        parts = self.deciding or self.parts
        return min(parts, key=lambda part: (WEAKEST_FIRST.index(part.verdict), -1 if part.rung is None else part.rung))

    @property
    def verdict(self) -> ClaimVerdict:
        """By `RULE`."""
        return self.weakest.verdict if self.deciding else ClaimVerdict.CANNOT_TELL

    @property
    def reason(self) -> str:
        """Why, in a sentence or two."""
        count, part = len(self.deciding), self.weakest
        if self.verdict is ClaimVerdict.HOLDS:
            whole = "The one part that decides holds" if count == 1 else f"All {count} parts that decide hold"
            return f"{whole}. {part.reason}"
        if self.verdict is ClaimVerdict.NOT_TESTED:
            return part.reason
        opened = "This does not hold" if self.verdict is ClaimVerdict.FAILS else "This cannot be told"
        return f"{opened}: {_lowered(part.statement)} {part.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the fields, the verdict with its reason, and the numbers of the part that it turns on."""
        part = self.weakest
        fields = {name: getattr(self, name) for name in ("number", "key", "statement", "measure", "null")}
        numbers = {name: getattr(part, name) for name in ("effect", "unit", "ci_low", "ci_high", "q", "n", "n_of", "rung")}
        told = {"verdict": self.verdict, "reason": self.reason, "turns_on": part.source} | numbers
        last = {"rule": RULE, "would_change": self.would_change, "command": self.command}
        return _plain(fields | told | last) | {"parts": [each.to_dict() for each in self.parts]}


def _lowered(statement: str) -> str:
    return statement[:1].lower() + statement[1:]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def counted(claims: Sequence[Claim]) -> dict[str, int]:
    """How many claims have each verdict, the strongest first."""
    return {each.value: sum(claim.verdict is each for claim in claims) for each in reversed(WEAKEST_FIRST)}
