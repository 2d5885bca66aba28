"""Balance without an auxiliary loss: the router bias moves against the load."""

from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from ling_probe.model.modeling import gates


class BiasBalancer:
    """Counts what every router chooses and moves its bias against the excess."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.gates = list(gates(model).values())
        self.real: torch.Tensor | None = None
        self.counts = [torch.zeros(gate.n_experts, device=gate.weight.device) for gate in self.gates]
        self.window = np.zeros((len(self.gates), self.gates[0].n_experts if self.gates else 1), dtype=np.int64)
        """Tokens per routed layer and expert since it was last zeroed [M, E]; a dense model has no routed layer."""

    def attach(self, stack: ExitStack) -> None:
        """Count until the stack closes."""
        for row, gate in enumerate(self.gates):
            handle = gate.register_forward_hook(lambda _gate, _args, out, row=row: self._count(row, out[2]))
            stack.callback(handle.remove)

    def _count(self, row: int, ids: torch.Tensor) -> None:
        chosen = ids if self.real is None else ids[self.real.reshape(-1)]
        self.counts[row] += torch.bincount(chosen.reshape(-1), minlength=self.counts[row].numel())

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias once and start counting afresh."""
        for row, (gate, counts) in enumerate(zip(self.gates, self.counts, strict=True)):
            excess = torch.sign(counts.mean() - counts)
            gate.expert_bias += self.rate * (excess - excess.mean())
            self.window[row] += counts.long().cpu().numpy()
            counts.zero_()
