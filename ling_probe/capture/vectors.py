"""Full vectors of chosen sites, taken from the pass that is run anyway and put aside on a disk at once.

A router's input is what its gate is given, a residual what its layer returns, an expert's vector one of the contributions that
`writes` spreads out; nothing is computed twice. Memory holds the vectors of one site and batch; positions, four bytes a vector,
stay until the sequence's trace is gone, and so does the nameless file: a killed process leaves nothing behind.
"""

import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ling_probe.activations import ActivationSpec, Site
from ling_probe.capture.layout import Layout
from ling_probe.errors import RunError
from ling_probe.model.load import LoadedLing
from ling_probe.trace import Activation


class Spill:
    """A nameless file that arrays are put into and read back from, in any thread; it goes with its last reader."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def put(self, vectors: np.ndarray) -> int:
        """Append an array, and say where it begins.

        Raises:
            RunError: The disk takes no more.
        """
        try:
            with self._lock:
                start = self._file.seek(0, 2)
                self._file.write(np.ascontiguousarray(vectors).data)
                return start
        except OSError as error:
            raise RunError(
                f"activations could not be put aside ({error.strerror or error}); make room, and go on with --resume"
            ) from error

    def read(self, start: int, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """What was put there."""
        found = np.empty(shape, dtype)
        with self._lock:
            self._file.seek(start)
            self._file.readinto(found.reshape(-1).view(np.uint8).data)
        return found


class VectorRecorder:
    """Takes the vectors of one batch.

    Args:
        loaded: The model.
        wanted: Which.
        layouts: Of the batch's sequences.
        width: Tokens of a padded sequence.
        spill: Where vectors go.
    """

    def __init__(self, loaded: LoadedLing, wanted: ActivationSpec, layouts: Sequence[Layout], width: int, spill: Spill) -> None:
        self._loaded, self._wanted, self._width, self._spill = loaded, wanted, width, spill
        cover = np.zeros((len(layouts), width), bool)
        for row, layout in enumerate(layouts):
            cover[row, : len(layout.segment)] = wanted.covers(layout.segment, layout.steps)
        self._cover = torch.from_numpy(cover.reshape(-1)).to(loaded.native.device)
        self._tokens = self._cover.nonzero()[:, 0]
        self._experts = {layer: [s for s in wanted.sites if s.kind == "expert" and s.layer == layer] for layer in self.layers}
        self._ids = torch.empty(0)
        self._found: list[dict[str, Activation]] = [{} for _ in layouts]

    @property
    def layers(self) -> set[int]:
        """Whose experts' vectors are wanted; their calls must be spread."""
        return {site.layer for site in self._wanted.sites if site.kind == "expert"}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the block runs; nothing stays attached."""
        with ExitStack() as stack:
            for remove in self._attach():
                stack.callback(remove)
            yield

    def _attach(self) -> Iterator[Callable[[], None]]:
        gates, layers = self._loaded.gates(), self._loaded.native.model.layers
        for site in self._wanted.sites:
            if site.kind == "residual":
                see = partial(self._see, site)
                yield layers[site.layer].register_forward_hook(lambda _m, _a, out, see=see: see(out)).remove
            elif site.kind == "router":
                see = partial(self._see, site)
                yield gates[site.layer].register_forward_hook(lambda _m, args, _out, see=see: see(args[0])).remove
        for layer in self.layers:
            yield gates[layer].register_forward_hook(lambda _m, _a, out: self._see_ids(out[2])).remove

    def _see(self, site: Site, vectors: torch.Tensor) -> None:
        self._keep(site, self._tokens, vectors.flatten(0, -2)[self._tokens])

    def _see_ids(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def see_slots(self, layer: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Outputs [T K D] and weights [T K] of a layer's chosen experts, right after its gate has chosen them."""
        for site in self._experts.get(layer, ()):
            token, slot = ((self._ids == site.expert) & self._cover[:, None]).nonzero(as_tuple=True)
            added = outputs[token, slot] * weights[token, slot, None]
            self._keep(site, token, added.to(outputs.dtype))

    def _keep(self, site: Site, tokens: torch.Tensor, vectors: torch.Tensor) -> None:
        """Put vectors [N D] of ascending tokens [N] of the batch aside, and remember what belongs to which sequence."""
        stored = _as_numpy(vectors)
        start = self._spill.put(stored)
        rows, positions = np.divmod(tokens.cpu().numpy(), self._width)
        stops = np.searchsorted(rows, np.arange(len(self._found)), side="right")
        for found, first, stop in zip(self._found, [0, *stops[:-1]], stops, strict=True):
            place, shape = start + int(first) * stored[:1].nbytes, (int(stop - first), stored.shape[1])
            read = partial(self._spill.read, place, shape, stored.dtype)
            found[site.name] = Activation(positions[first:stop].astype(np.int32), read)

    def of(self, row: int) -> dict[str, Activation]:
        """What was found for one sequence of the batch, by site."""
        return self._found[row]


def _as_numpy(vectors: torch.Tensor) -> np.ndarray:
    """The numbers as they are; bfloat16, which NumPy lacks, as its bits."""
    vectors = vectors.cpu()
    return vectors.view(torch.uint16).numpy() if vectors.dtype == torch.bfloat16 else vectors.numpy()
