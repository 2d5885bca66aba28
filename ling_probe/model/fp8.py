"""Block-scaled FP8 weights, as Ling 2.0's FP8 checkpoints store them: checked from headers, and turned back into numbers.

A quantised matrix is ``float8_e4m3fn``; beside ``NAME`` lies ``NAME_scale_inv``, one float32 for every block of (usually)
128 x 128 entries, the last row and column of blocks possibly partial. The number is the entry times its block's scale.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling_probe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from ling_probe.model.files import Stored

SCALE = "_scale_inv"
"""What a quantised tensor's name is followed by in its scales' name."""
Block = tuple[int, int]
_FLOAT8 = "F8_E4M3"
_PLAIN = ("F64", "F32", "F16", "BF16")


def block_size(values: Mapping[str, Any], folder: Path) -> Block | None:
    """Rows and columns that share a scale, from a ``config.json``'s values; None if they announce no quantised weights.

    Raises:
        ConfigError: Quantised in another way.
    """
    found = values.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != "fp8":
        raise ConfigError(f"{folder} holds weights quantised by {method!r}; bf16, fp16, fp32 and block-scaled fp8 are read")
    block = found.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ConfigError(f"{folder}: weight_block_size is {block!r}; fp8 weights are read in blocks of [rows, columns]")
    return block[0], block[1]


def check_stored(stored: Mapping[str, "Stored"], names: Iterable[str], block: Block | None, folder: Path) -> None:
    """Refuse tensors in a number type that is not read, and quantised ones without fitting scales.

    Raises:
        CheckpointError: The first such tensor.
    """
    for name in names:
        tensor = stored[name]
        if tensor.dtype == _FLOAT8 and len(tensor.shape) == 2:
            _check_scale(stored, name, block, folder)
        elif tensor.dtype not in _PLAIN:
            raise CheckpointError(
                f"{folder}: {name} is stored as {tensor.dtype}; {', '.join(_PLAIN)} and fp8 matrices are read"
            )


def _check_scale(stored: Mapping[str, "Stored"], name: str, block: Block | None, folder: Path) -> None:
    if block is None:
        raise CheckpointError(f"{folder}: {name} is fp8 and config.json has no quantization_config to say in which blocks")
    scale = stored.get(name + SCALE)
    if scale is None:
        raise CheckpointError(f"{folder}: {name} is fp8 and its scales {name}{SCALE} are missing; copy the checkpoint again")
    shape = stored[name].shape
    needed = tuple(math.ceil(size / each) for size, each in zip(shape, block, strict=True))
    if scale.shape != needed or scale.dtype != "F32":
        raise CheckpointError(
            f"{folder}: {name}{SCALE} is {scale.dtype} {list(scale.shape)}; {list(shape)} in blocks of "
            f"{block[0]} x {block[1]} needs F32 {list(needed)}"
        )


def dequantise(weight: "torch.Tensor", scale: "torch.Tensor", block: Block) -> "torch.Tensor":
    """Entries times the scale of their block, in float32.

    >>> import torch
    >>> weight, scale = torch.ones(2, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0, 0.5]])
    >>> dequantise(weight, scale, (2, 2))
    tensor([[2.0000, 2.0000, 0.5000],
            [2.0000, 2.0000, 0.5000]])
    """
    for axis, size in enumerate(block):
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, weight.shape[axis])
    return weight.float() * scale
