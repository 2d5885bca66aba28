"""What the gates return, copied and never derived."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from ling_probe.model.load import LoadedLing


class _Recorder:
    """Copies what every gate returns in one forward pass."""

    def __init__(self, loaded: LoadedLing, *, logits: bool) -> None:
        self._gates = loaded.gates()
        self._spec = loaded.spec
        self._with_logits = logits
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the block runs; nothing stays attached."""
        with ExitStack() as stack:
            for layer, gate in self._gates.items():
                handle = gate.register_forward_hook(lambda _gate, _args, out, layer=layer: self._see(layer, out))
                stack.callback(handle.remove)
            yield

    def _see(self, layer: int, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, weights, ids = out
        self._seen[layer] = (ids, weights, logits if self._with_logits else None)

    def arrays(self, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids and weights [B, S, M, K], and logits [B, S, M, E] if kept, on the CPU; M is 0 for a dense model."""

        def stack(index: int, dtype: Any) -> np.ndarray:
            if not self._gates:
                return np.zeros((rows, width, 0, self._spec.n_experts if index == 2 else self._spec.top_k), dtype)
            parts: Any = [self._seen[layer][index] for layer in self._gates]
            stacked = torch.stack(parts, dim=1).cpu().numpy().astype(dtype)
            return stacked.reshape(rows, width, *stacked.shape[1:])

        return stack(0, self._spec.id_dtype), stack(1, np.float32), stack(2, np.float32) if self._with_logits else None
