"""Processes that share one training run and stay equal to the last bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier

import torch

PATIENCE = 300.0
"""Seconds that a worker waits for the others before it takes one for lost."""


class Team:
    """The worker processes that share one training run; each computes some parts of every batch and moves some matrices.

    Only the time differs from working alone: gradients are sums over all parts, up to the order of summation. The workers
    meet in shared memory, one row each, and everybody adds the rows in the same order: they stay equal to the last bit.
    """

    def __init__(self, rank: int = 0, size: int = 1, rows: torch.Tensor | None = None, barrier: Barrier | None = None) -> None:
        self.rank, self.size, self.rows, self.barrier = rank, size, rows, barrier

    @torch.no_grad()
    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the team."""
        if self.size == 1:
            return
        with self._published(tensors) as rows:
            _unpack(rows.sum(0), tensors)

    @torch.no_grad()
    def share(self, shares: Sequence[Sequence[torch.Tensor]]) -> None:
        """Give everybody the tensors that each worker has moved."""
        if self.size == 1:
            return
        with self._published(shares[self.rank]) as rows:
            for row, tensors in zip(rows, shares, strict=True):
                _unpack(row, tensors)

    @contextmanager
    def _published(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What everybody wrote, until everybody has read it."""
        assert self.rows is not None
        assert self.barrier is not None
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.rows[self.rank, : flat.numel()] = flat
        self.barrier.wait(PATIENCE)
        yield self.rows
        self.barrier.wait(PATIENCE)


def _unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


ALONE = Team()
