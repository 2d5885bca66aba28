"""What experts and layers write to the residual stream: norms, and direct logit attribution; every expert runs once.

Axes as in `spec`; T is the padded tokens of a batch, n the token that followed.

1. Before a layer's experts run, their call is spread out: every token K times, one expert each, weight 1. They return each
   expert's own output ``out`` [T K D] and the experts implementation in use (eager, grouped_mm, batched_mm) stays closed.
2. ``weight * out`` is an expert's *contribution*. Its norm is kept, and the block's output is the sum of the contributions in
   float32: the sum that every implementation ends with, so that nothing downstream changes.
3. *Direct logit attribution* of a vector c written at position t, with the final RMSNorm frozen at the scale it really has
   there (gain g, last residual x_t, unembedding row U_n of the next token n):

       lens(c) = c . (g * U_n) / rms(x_t),    rms(x) = sqrt(mean(x^2) + eps)

   This is linear in c, so that over all that is written to the stream (embedding, attention, dense and routed networks) it sums
   to the model's own logit of n. It is the direct path only: what later layers make of c is not in it. ("logit lens",
   nostalgebraist 2020; direct logit attribution, Elhage et al. 2021.)

``g * U_n`` is known before the pass, so [T M K] numbers are all that is held; vectors live for one layer.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ling_probe.capture.vectors import VectorRecorder
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingModel, LingMoE

_SLICE = 1024
"""Tokens attributed at a time; K x D float32 numbers each are held."""


class WriteRecorder:
    """Records contributions, residual norms and attributions of one forward pass.

    Args:
        loaded: The model.
        keep: Any of "contribution", "residual" and "lens"; nothing is attached for none.
        input_ids: Of the batch that will be run, right-padded [B S].
        vectors: Is shown the experts' outputs of the layers it wants.
    """

    def __init__(
        self, loaded: LoadedLing, keep: Collection[str], input_ids: torch.Tensor, vectors: VectorRecorder | None = None
    ) -> None:
        self._loaded = loaded
        self._keep = frozenset(keep) & {"contribution", "residual", "lens"}
        self._shape, self._vectors = tuple(input_ids.shape), vectors
        self._direction = next_token_directions(loaded, input_ids) if "lens" in self._keep else None
        self._scale = torch.empty(0)
        self._found: dict[str, dict[int, torch.Tensor]] = {}
        """By name and layer: [T] or [T K]."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the block runs; nothing stays attached."""
        with ExitStack() as stack:
            for remove in self._attach(self._loaded.native.model):
                stack.callback(remove)
            yield

    def _attach(self, model: LingModel) -> Iterator[Callable[[], None]]:
        for number, layer in enumerate(model.layers):
            if "residual" in self._keep:
                yield _on_output(layer, partial(self._see_residual, number))
            shown = self._vectors is not None and number in self._vectors.layers
            if isinstance(layer.mlp, LingMoE) and (shown or self._keep & {"contribution", "lens"}):
                yield from self._attach_block(layer.mlp, number)
        if self._direction is not None:
            yield model.norm.register_forward_pre_hook(lambda _m, args: self._see_scale(args[0])).remove

    def _attach_block(self, block: LingMoE, layer: int) -> Iterator[Callable[[], None]]:
        yield from spread_experts(block.experts, partial(self._see_slots, layer))
        if hasattr(block, "shared_experts"):
            yield _on_output(block.shared_experts, partial(self._see_shared, layer))

    def _see(self, name: str, layer: int, values: torch.Tensor) -> None:
        self._found.setdefault(name, {})[layer] = values

    def _see_residual(self, layer: int, residual: torch.Tensor) -> None:
        self._see("residual", layer, _norm(residual).flatten())

    def _see_slots(self, layer: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        if self._vectors is not None:
            self._vectors.see_slots(layer, outputs, weights)
        if "contribution" in self._keep:
            self._see("contribution", layer, _norm(outputs) * weights)
        if self._direction is not None:
            self._see("lens", layer, along(outputs, self._direction) * weights)

    def _see_shared(self, layer: int, output: torch.Tensor) -> None:
        output = output.flatten(0, -2)
        if "contribution" in self._keep:
            self._see("shared", layer, _norm(output))
        if self._direction is not None:
            self._see("lens_shared", layer, along(output[:, None], self._direction)[:, 0])

    def _see_scale(self, residual: torch.Tensor) -> None:
        self._scale = final_scale(self._loaded, residual)

    def arrays(self) -> dict[str, np.ndarray]:
        """By name of an extra, [B S M], [B S M K], or for "residual" [B S L] over all decoder layers; on the CPU."""
        return {name: self._stacked(name, by_layer) for name, by_layer in self._found.items()}

    def _stacked(self, name: str, by_layer: dict[int, torch.Tensor]) -> np.ndarray:
        values = torch.stack([by_layer[layer] for layer in sorted(by_layer)], dim=1)
        if name.startswith("lens"):
            values = values * self._scale.view(-1, *([1] * (values.dim() - 1)))
        return values.float().cpu().numpy().reshape(*self._shape, *values.shape[1:])


def spread_experts(experts: torch.nn.Module, see: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[Callable[[], None]]:
    """Attach hooks that show each call's outputs [T K D] and weights [T K]; yields what removes each hook."""
    held: list[torch.Tensor] = []

    def spread(_experts: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, ids, weights = args
        held.append(weights)
        return hidden.repeat_interleave(ids.shape[1], dim=0), ids.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1)

    def gather(_experts: torch.nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        weights = held.pop()
        outputs = out.view(*weights.shape, -1)
        see(outputs, weights)
        return (outputs * weights[..., None]).sum(dim=1).to(out.dtype)

    yield experts.register_forward_pre_hook(spread).remove
    yield experts.register_forward_hook(gather).remove


def next_token_directions(loaded: LoadedLing, input_ids: torch.Tensor) -> torch.Tensor:
    """Final norm's gain times the unembedding row of the token after each one [T D] float32; the last column means nothing."""
    following = input_ids.roll(-1, dims=1).flatten()
    return loaded.native.lm_head.weight[following].float() * loaded.native.model.norm.weight.float()


def final_scale(loaded: LoadedLing, residual: torch.Tensor) -> torch.Tensor:
    """What the final norm multiplies each position of the last residual [B S D] with, before its gain: 1 / rms [T]."""
    epsilon = loaded.native.model.norm.variance_epsilon
    return torch.rsqrt(residual.float().pow(2).mean(-1) + epsilon).flatten()


def along(vectors: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Products [T n] of vectors [T n D] with each token's direction [T D], in float32."""
    parts = zip(vectors.split(_SLICE), direction.split(_SLICE), strict=True)
    return torch.cat([torch.bmm(part.float(), towards[..., None])[..., 0] for part, towards in parts])


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _on_output(module: torch.nn.Module, see: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    return module.register_forward_hook(lambda _module, _args, out: see(out)).remove
