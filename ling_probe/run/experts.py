"""What every expert listens to and what it writes, a vector each, for readers that have no model.

``gate`` [M E D] is the expert's router row; ``output`` [M E D] the first left singular vector of its down projection, times the
singular value: the direction it writes most along, as a line, so that its sign means nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float16
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ling_probe.errors import RunError
from ling_probe.run.tables import file_digest

EXPERTS = "experts.safetensors"


def write_experts(vectors: Mapping[str, Float16[np.ndarray, "M E D"]], folder: Path) -> str:
    """Put the file into a run folder in one step, through to the disk, and return its sha256."""
    new = folder / f"{EXPERTS}.new"
    with new.open("wb") as file:
        file.write(save(dict(vectors)))
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / EXPERTS)
    return file_digest(folder / EXPERTS)


def read_experts(folder: Path) -> dict[str, Float16[np.ndarray, "M E D"]]:
    """What `write_experts` wrote, by name.

    Raises:
        RunError: The file is damaged.
    """
    try:
        return load_file(folder / EXPERTS)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / EXPERTS} cannot be read ({error}); it is damaged: copy the run again") from error
