"""Invented names: a first and a second piece, one token each.

A fifth of the combinations is held out of training. Every piece stands in as many held-out names as every other, so a model
that meets a held-out name has seen both of its pieces and never the two together.
"""

from ling_probe.stepbench.draw import Draw

# fmt: off
FIRST = (
    "wum", "dax", "tor", "zib", "mox", "tal", "vel", "lor", "pel", "gim", "rov", "fen",
    "hal", "jut", "kel", "nub", "sab", "yor", "bax", "cov", "dup", "gaz", "mib", "ruk",
)
SECOND = (
    "pus", "vek", "lom", "tis", "gar", "nix", "bor", "del", "fum", "zan", "rit", "kad",
    "hov", "mep", "jin", "wex", "tul", "sof", "yed", "kip", "dop", "gul", "raz", "nem",
)
# fmt: on
_HELD_OUT_PER_PIECE = 5


def is_held_out(first: int, second: int) -> bool:
    """Whether the name of these two pieces is kept for the ``novel-names`` split."""
    return (5 * first + second) % len(SECOND) < _HELD_OUT_PER_PIECE


_SECONDS = {
    novel: tuple(tuple(j for j in range(len(SECOND)) if is_held_out(i, j) == novel) for i in range(len(FIRST)))
    for novel in (False, True)
}


def all_names(*, held_out: bool) -> tuple[str, ...]:
    """Every name of training, or every held-out one."""
    return tuple(FIRST[i] + SECOND[j] for i, seconds in enumerate(_SECONDS[held_out]) for j in seconds)


def draw_names(draw: Draw, count: int, *, held_out: bool) -> list[str]:
    """Names for one problem, at most 24; no two share a piece."""
    while True:
        names = _try_names(draw, count, held_out)
        if len(names) == count:
            return names


def _try_names(draw: Draw, count: int, held_out: bool) -> list[str]:
    names: list[str] = []
    free = set(range(len(SECOND)))
    for first in draw.shuffled(range(len(FIRST)))[:count]:
        options = [second for second in _SECONDS[held_out][first] if second in free]
        if not options:
            break
        second = draw.choice(options)
        free.remove(second)
        names.append(FIRST[first] + SECOND[second])
    return names
