"""Random choices that come out the same on every Python version.

Only ``random()`` of the standard generator is promised to stay as it is, so everything else is built on it.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Draw:
    """Choices that depend on nothing but the key."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both possible."""
        return low + int(self._random() * (high - low + 1))

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[int(self._random() * len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        pool = list(items)
        for last in range(len(pool) - 1, 0, -1):
            other = int(self._random() * (last + 1))
            pool[last], pool[other] = pool[other], pool[last]
        return pool

    def merged(self, one: Sequence[Item], two: Sequence[Item]) -> list[Item]:
        """Both sequences in one, each in its own order."""
        turns = self.shuffled([iter(one)] * len(one) + [iter(two)] * len(two))
        return [next(turn) for turn in turns]
