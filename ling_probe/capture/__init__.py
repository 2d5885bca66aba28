"""Prompts to traces: run a loaded Ling and keep what its routers chose.

1. Take a window of records; in generating mode, complete each prompt first, greedily or by drawing.     `generation`
2. Sort the window by length and cut it into right-padded batches of at most ``batch_tokens`` tokens.     `batching`
3. Run the native model once over each batch with a plain forward hook on every gate; the gate's own
   ids and weights are copied, never derived.                                             `passes`, `gates`, `edits`
4. Where more is kept, take norms, attributions and vectors from the same pass, layer by layer.    `writes`, `vectors`
5. Compute the next-token loss from the last hidden states in slices, so that logits of the whole batch
   never exist.                                                                                               `passes`
6. Undo the sorting and yield one checked `RoutingTrace` a record, in the order of the records.                 `flow`

A generated text is recorded by the forward pass of step 3, prompt and completion, not by the decoding steps; in float32 both
choose the same experts.
"""

from ling_probe.capture.batching import length_batches
from ling_probe.capture.flow import KEEP, WINDOW, capture, check_keep
from ling_probe.capture.gates import _Recorder
from ling_probe.capture.generation import Decoding
from ling_probe.capture.sequences import read_sequence

__all__ = ["KEEP", "WINDOW", "Decoding", "_Recorder", "capture", "check_keep", "length_batches", "read_sequence"]
