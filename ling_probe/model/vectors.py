"""What an expert listens to and what it writes, one vector each, so that experts can be compared without the model at hand."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float16

if TYPE_CHECKING:
    from ling_probe.model.load import LoadedLing

_AT_A_TIME = 32
"""Experts whose projections are held in float32."""
_SKETCH, _SWEEPS = 8, 8
"""Width and sweeps of the subspace iteration: errors shrink with (ninth over first singular value) to twice the sweeps."""


@torch.no_grad()
def expert_vectors(loaded: "LoadedLing") -> dict[str, Float16[np.ndarray, "M E D"]]:
    """Router rows ("gate") and the direction every expert writes most along ("output"); see `run.experts`."""
    gates, outputs = [], []
    for layer, gate in loaded.gates().items():
        block: Any = loaded.native.model.layers[layer]
        projections: torch.Tensor = block.mlp.experts.down_proj
        gates.append(gate.weight.detach().float().cpu())
        some = torch.split(projections, _AT_A_TIME)
        outputs.append(torch.cat([first_singular(each.float()).cpu() for each in some]))
    return {name: torch.stack(rows).half().numpy() for name, rows in (("gate", gates), ("output", outputs))}


def first_singular(matrices: torch.Tensor) -> torch.Tensor:
    """First left singular vector times its value [N D] of matrices [N D F], by subspace iteration; largest entry positive."""
    start = torch.randn(matrices.shape[-1], _SKETCH, generator=torch.Generator().manual_seed(0)).to(matrices)
    basis = start.expand(len(matrices), -1, -1)
    for _ in range(_SWEEPS):
        basis = torch.linalg.qr(matrices.mT @ (matrices @ basis)).Q
    image = matrices @ basis
    _, vectors = torch.linalg.eigh(image.mT @ image)
    first = (image @ vectors[..., -1:])[..., 0]
    sign = first.gather(-1, first.abs().argmax(dim=-1, keepdim=True)).sign()
    return first * sign
