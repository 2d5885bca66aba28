"""Which records make which part, and which machine captures which parts.

Where a part begins follows from the records and options alone: not from the machine, the number of shards, or where a capture
was interrupted. A part is captured by itself, in batches of its own, so on like machines its files come out the same, byte
for byte, whoever writes them and however often it is begun anew.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError

PART_TOKENS = 50_000
"""About so many tokens make a part: what an interruption can cost, and what memory holds."""
PART_BATCHES = 4
"""A part is no smaller than so many batches, unless more parts are asked for."""
_BYTES_A_TOKEN = 3


@dataclass(frozen=True)
class Shard:
    """One of several equal shares of a run: every ``of``-th part, beginning with part ``index`` - 1."""

    index: int
    """1 to `of`."""
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise UsageError(
                f"there is no shard {self.index} of {self.of}; shards are counted from 1/{self.of} to {self.of}/{self.of}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard that ``i/n`` names.

        >>> Shard.parse("2/4")
        Shard(index=2, of=4)
        """
        if not (found := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)):
            raise UsageError(f'"{text}" names no shard; write i/n, such as 2/4 for the second of four')
        return cls(int(found[1]), int(found[2]))

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"shard-{self.index}-of-{self.of}"

    def holds(self, part: int) -> bool:
        """Whether a part, counted from 0, is in this share."""
        return part % self.of == self.index - 1


def cut(records: Sequence[Record], *, max_new_tokens: int, batch_tokens: int, least: int) -> list[Sequence[Record]]:
    """Records in consecutive parts of about the same number of tokens, by a guess that needs no tokenizer.

    Args:
        records: All of a run.
        max_new_tokens: Of each completion; 0 where solutions are read.
        batch_tokens: Of a forward pass.
        least: At least so many parts.

    Raises:
        UsageError: There are fewer records than ``least``.
    """
    if len(records) < least:
        raise UsageError(f"{len(records)} records cannot be cut into {least} parts; ask for {len(records)} at most")
    ends = list(accumulate(_guess(record, max_new_tokens) for record in records))
    budget = _BYTES_A_TOKEN * max(PART_TOKENS, PART_BATCHES * batch_tokens)
    n_parts = min(max(-(-ends[-1] // budget), least), len(records))
    bounds = [0]
    for part in range(1, n_parts):
        here = bisect_left(ends, ends[-1] * part // n_parts) + 1
        bounds.append(min(max(here, bounds[-1] + 1), len(records) - n_parts + part))
    return [records[start:stop] for start, stop in pairwise([*bounds, len(records)])]


def _guess(record: Record, max_new_tokens: int) -> int:
    """Thirds of a token."""
    rest = _BYTES_A_TOKEN * max_new_tokens if max_new_tokens > 0 else len(record.solution.encode())
    return len(record.prompt.encode()) + rest
