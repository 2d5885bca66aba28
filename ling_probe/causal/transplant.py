"""Give the tokens of a step the experts that the same tokens chose elsewhere: in steps of its kind, or of another.

A transplant moves choices, not activations: at a token of the step, the experts of a token of the same id in another problem
take the place of its own, in every routed layer; weights follow from the token's own scores. If routing follows the step and
matters to it, experts of another kind of step cost more than experts of the same kind. Both transplants touch the same tokens:
those whose id occurs in both.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Int64, Integer

from ling_probe.causal.measure import ANSWER, Batch, Scores, Solutions

UNTOUCHED = -1


class Choices:
    """Expert choices of every token of some solutions under the model's own router, one row a token."""

    def __init__(self, solutions: Solutions) -> None:
        self._solutions = solutions
        self._gates = solutions.loaded.gates()
        seen: list[np.ndarray] = []

        @contextmanager
        def record(_batch: Batch) -> Iterator[None]:
            found: dict[int, torch.Tensor] = {}
            with ExitStack() as stack:
                for layer, gate in self._gates.items():
                    hook = lambda _m, _a, ids, layer=layer: found.update({layer: ids.cpu()})  # noqa: E731
                    stack.callback(gate.expert_ids.register_forward_hook(hook).remove)
                yield
            seen.append(torch.stack([found[layer] for layer in self._gates], dim=1).numpy())

        solutions.scores(record)
        self.ids: Int64[np.ndarray, "N M K"] = np.concatenate(seen)
        self._starts = np.cumsum([0, *(len(each) for each in seen)])
        self.token = np.concatenate([batch.input_ids.cpu().numpy().ravel() for batch in solutions.batches])
        self.unit = np.concatenate([_own_unit(batch).ravel() for batch in solutions.batches])

    def with_donors(self, donor: Integer[np.ndarray, " N"]) -> Scores:
        """Scores with the experts of row `donor` in the place of a token's own; `UNTOUCHED` keeps them."""
        starts = iter(self._starts[:-1])

        def change(batch: Batch) -> AbstractContextManager[None]:
            start = next(starts)
            return self._moved(donor[start : start + batch.input_ids.numel()])

        return self._solutions.scores(change)

    @contextmanager
    def _moved(self, donor: Integer[np.ndarray, " N"]) -> Iterator[None]:
        touched = torch.from_numpy(donor >= 0)[:, None]

        with ExitStack() as stack:
            for row, gate in enumerate(self._gates.values()):
                given = torch.from_numpy(self.ids[np.maximum(donor, 0), row])

                def move(_m: object, _a: object, ids: torch.Tensor, given: torch.Tensor = given) -> torch.Tensor:
                    return torch.where(touched.to(ids.device), given.to(ids), ids)

                stack.callback(gate.expert_ids.register_forward_hook(move).remove)
            yield


def draw_donors(
    choices: Choices, solutions: Solutions, label: str, *, rng: np.random.Generator
) -> tuple[Integer[np.ndarray, " N"], Integer[np.ndarray, " N"]]:
    """Donors for every token of a step of the label: of the same id in another problem of the family.

    The first are from steps of the label, the second from steps of another. Tokens that lack either are untouched in both.
    """
    families = np.unique([record.family for record in solutions.records], return_inverse=True)[1]
    unit, inside = choices.unit, choices.unit >= 0
    own = np.zeros(len(unit), bool)
    own[inside] = solutions.labels[unit[inside]] == label
    step = np.zeros(len(unit), bool)
    step[inside] = solutions.labels[unit[inside]] != ANSWER
    problem = np.where(inside, solutions.problem[np.maximum(unit, 0)], -1)
    key = choices.token.astype(np.int64) * (families.max() + 1) + np.where(inside, families[np.maximum(problem, 0)], 0)
    wanted = np.flatnonzero(own)
    same = _drawn(wanted, np.flatnonzero(own), key, problem, rng)
    other = _drawn(wanted, np.flatnonzero(step & ~own), key, problem, rng)
    both = (same >= 0) & (other >= 0)
    rows = np.full((2, len(unit)), UNTOUCHED)
    rows[:, wanted[both]] = np.stack([same[both], other[both]])
    return rows[0], rows[1]


def _drawn(
    wanted: np.ndarray, pool: np.ndarray, key: np.ndarray, problem: np.ndarray, rng: np.random.Generator
) -> Integer[np.ndarray, " W"]:
    """A row of the pool with the same key and another problem for each wanted row; `UNTOUCHED` where the draw finds none."""
    pool = pool[np.argsort(key[pool], kind="stable")]
    first, last = np.searchsorted(key[pool], key[wanted]), np.searchsorted(key[pool], key[wanted], side="right")
    found = np.full(len(wanted), UNTOUCHED)
    for _ in range(8):
        place = first + (rng.random(len(wanted)) * (last - first)).astype(np.int64)
        row = np.where(last > first, pool[np.minimum(place, len(pool) - 1)], UNTOUCHED) if len(pool) else found
        good = (found < 0) & (row >= 0) & (problem[np.maximum(row, 0)] != problem[wanted])
        found = np.where(good, row, found)
    return found


def _own_unit(batch: Batch) -> np.ndarray:
    """Unit of each position's own token [B, S]; the batch holds that of the next."""
    own = np.full_like(batch.unit, -1)
    own[:, 1:] = batch.unit[:, :-1]
    return own
