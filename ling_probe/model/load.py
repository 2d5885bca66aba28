"""Load a Ling 2.0 and prove, before anything is captured, that it routes by the rule."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ling_probe.errors import RoutingMismatch, UsageError
from ling_probe.model.assemble import assemble
from ling_probe.model.files import Checkpoint, find_checkpoint, weight_digest
from ling_probe.model.modeling import LingForCausalLM, LingGate, gates
from ling_probe.model.vectors import expert_vectors
from ling_probe.routing import RoutingDifference, compare_routing, router_logits
from ling_probe.spec import ModelSpec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TOLERANCE = 1e-5
"""In choice scores and in weights; float32 sums in another order stay below it."""


@dataclass(frozen=True)
class Verification:
    """How many of the model's own choices on one batch the NumPy rule does not give."""

    choices: int
    """Token and layer pairs compared."""
    differ: int
    near_ties: int
    """Choices among candidates closer than the tolerance; counted, not failed."""
    max_weight_error: float
    tolerance: float = TOLERANCE

    def __str__(self) -> str:
        ties = f", {self.near_ties} near ties" if self.near_ties else ""
        return f"{self.differ} of {self.choices:,} differ{ties}; largest weight error {self.max_weight_error:.1e}"


@dataclass(frozen=True)
class LoadedLing:
    """A native model ready to run, with what a manifest records about it."""

    native: LingForCausalLM
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    digest: str
    """SHA-256 of the weight files."""
    verification: Verification

    def describe(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        biases = {str(layer): gate.expert_bias.tolist() for layer, gate in self.gates().items()}
        return {
            "name": self.spec.name,
            "digest": self.digest,
            "dtype": str(self.native.dtype).removeprefix("torch."),
            "device": self.native.device.type,
            "parameters": sum(p.numel() for p in self.native.parameters()),
            "tokenizer": type(self.tokenizer).__name__,
            "tokenizer_digest": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "verification": asdict(self.verification),
            "expert_bias": biases,
        }

    def gates(self) -> dict[int, LingGate]:
        """The routers by decoder layer."""
        return gates(self.native)

    def expert_vectors(self) -> dict[str, np.ndarray]:
        """What every expert listens to and what it writes, [M E D] each by name; nothing where weights are not at hand."""
        return expert_vectors(self)


def load_native(name_or_path: str, *, revision: str | None = None, device: str = "auto", dtype: Dtype = "auto") -> LoadedLing:
    """Load the plain model that bulk capture runs, and verify its routing.

    Args:
        name_or_path: A folder in the original layout, a shipped checkpoint's name, or a hub repository; each may end in
            ``@step-N``, a snapshot saved while it was trained, on the hub in ``@`` and a revision.
        revision: Branch, tag or commit on the hub.
        device: "auto" is the first GPU, else the CPU.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on the CPU. The router's bias is float32 in any case.

    Raises:
        CheckpointError: Missing, truncated, or not fitting its configuration.
        ConfigError: Not a Ling 2.0 that we can run.
        RoutingMismatch: It does not route by the rule.
        UsageError: A device that is not there, or two revisions.
    """
    checkpoint = find_checkpoint(name_or_path, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_folder)
    where = _device(device)
    kind: Any = ("auto" if where.type != "cpu" else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    native = _read_native(checkpoint, kind).to(where).eval()
    spec = checkpoint.config.spec(checkpoint.name)
    return LoadedLing(
        native=native,
        tokenizer=tokenizer,
        spec=spec,
        digest=weight_digest(checkpoint.files),
        verification=verify_routing(native, spec),
    )


def _read_native(checkpoint: Checkpoint, kind: Any) -> LingForCausalLM:
    if checkpoint.block is not None:
        return assemble(checkpoint, checkpoint.config.dtype or torch.bfloat16 if kind == "auto" else kind)
    return LingForCausalLM.from_pretrained(
        checkpoint.folder, config=checkpoint.config, dtype=kind, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )


def load_model(name_or_path: str, *, revision: str | None = None, device: str = "auto", dtype: Dtype = "auto") -> Any:
    """Load a `HookedLing`: a TransformerLens bridge over the verified native model. Arguments and errors as `load_native`."""
    from ling_probe.model.bridge import HookedLing

    loaded = load_native(name_or_path, revision=revision, device=device, dtype=dtype)
    return HookedLing.wrap(loaded)


@torch.no_grad()
def verify_routing(native: LingForCausalLM, spec: ModelSpec, *, sequences: int = 4, positions: int = 64) -> Verification:
    """Re-derive one batch's routing from the gates' recorded inputs, weights and bias, and compare.

    The batch is random tokens from a fixed seed.

    Raises:
        RoutingMismatch: A choice differs by more than a near tie, or a weight by more than 1e-5; names the layer.
    """
    tokens = probe_tokens(spec, sequences, positions).to(native.device)
    recorded: dict[int, tuple[torch.Tensor, Any]] = {}
    routers = gates(native)
    handles = [
        gate.register_forward_hook(lambda _gate, args, out, layer=layer: recorded.__setitem__(layer, (args[0], out)))
        for layer, gate in routers.items()
    ]
    try:
        native.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return verified(compare_layer(gate, spec, layer, *recorded[layer]) for layer, gate in routers.items())


def probe_tokens(spec: ModelSpec, sequences: int = 4, positions: int = 64) -> torch.Tensor:
    """The random tokens [B, S] that a model's routing is proved on."""
    return torch.randint(spec.vocab_size, (sequences, positions), generator=torch.Generator().manual_seed(0))


def verified(layers: Iterable[RoutingDifference]) -> Verification:
    """The sum over layers, each of which was compared without a mismatch."""
    differences = list(layers)
    return Verification(
        choices=sum(d.choices for d in differences),
        differ=0,
        near_ties=sum(d.near_ties for d in differences),
        max_weight_error=max((d.max_weight_error for d in differences), default=0.0),
    )


def compare_layer(gate: LingGate, spec: ModelSpec, layer: int, inputs: torch.Tensor, out: Any) -> RoutingDifference:
    """Compare what a gate returned for some inputs with the rule.

    Raises:
        RoutingMismatch: As for `verify_routing`.
    """
    _, weights, ids = out
    logits = router_logits(_numpy(inputs), _numpy(gate.weight))
    found = compare_routing(ids.cpu().numpy(), _numpy(weights), logits, _numpy(gate.expert_bias), spec, tolerance=TOLERANCE)
    if found.differ or found.max_weight_error > TOLERANCE:
        raise RoutingMismatch(
            f"layer {layer} of {spec.name} does not route by the Ling 2.0 rule: {found.differ} of {found.choices:,} choices "
            f"differ, largest weight error {found.max_weight_error:.1e} (at most {TOLERANCE:.0e}); nothing was captured"
        )
    return found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f'no device "{name}"; use auto, cpu, cuda or cuda:N') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} asked for, and no GPU is visible to torch; use --device cpu")
    return device
