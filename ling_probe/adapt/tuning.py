"""Adapt a model to a task by its routers alone: everything else stays as it was.

1. Freeze all but what is tuned: the routers' weights; or, as references, the weights of as many parameters' worth of randomly
   drawn experts, or everything.
2. Minimise the next-token loss on solutions of the task. The choice of experts has no gradient; the weights of the chosen have
   one, so a router learns by how it weighs what it chose.
3. After every step move each router's bias against its load, as in training: no auxiliary loss.
4. Save a checkpoint in the original layout, and beside it what changed alone: `delta.safetensors`, by tensor of the checkpoint.

The bias can be held still, or moved alone.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from ling_probe.benchmarks import Record
from ling_probe.errors import CheckpointError, UsageError
from ling_probe.model import LingForCausalLM
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingExperts, gates
from ling_probe.train import Batch, BiasBalancer, collate, encode, save, weighted_losses

Tuned = Literal["router", "bias", "experts", "all"]
DELTA = "delta.safetensors"
"""What an adaptation changed, beside the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Everything that decides the adapted weights, apart from the task's problems and the library versions."""

    tuned: Tuned = "router"
    """router: the routers' weights and bias; bias: the bias alone; experts: randomly drawn experts with at least as many
    parameters as the routers; all: every parameter."""
    steps: int = 200
    batch_tokens: int = 3072
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    bias_rate: float = 1e-3
    """Step of the bias after every batch; 0 holds it still."""
    clip_norm: float = 1.0
    seed: int = 0
    """Of the draw of experts."""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a 0-based step: linear warm-up, then linear decay to zero."""
        return self.learning_rate * min((step + 1) / max(1, self.warmup_steps), (self.steps - step) / self.steps)


def adapt(loaded: LoadedLing, problems: Iterable[Record], adaptation: Adaptation, out: Path) -> Iterator[dict[str, Any]]:
    """Tune a loaded model in place and save it to ``out``; yields loss and load after every step.

    Args:
        loaded: A model in float32; afterwards it is the adapted one.
        problems: Of the task, with solutions; they should not run out before the last step, and must not be those it is
            judged on.
        adaptation: What to tune, how long.
        out: A folder that does not exist yet.

    Raises:
        UsageError: ``out`` exists, the model is not in float32 or has no router, or the problems run out.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a new folder")
    native = loaded.native
    if native.dtype != torch.float32:
        raise UsageError(f"{loaded.spec.name} is in {native.dtype}; tuning needs float32: give --dtype float32")
    if not loaded.spec.routed_layers:
        raise UsageError(f"{loaded.spec.name} is dense in every layer: it has no router to adapt")
    before = _numbers(native)
    native.train()
    try:
        yield from _tune(loaded, _batches(loaded, problems, adaptation), adaptation)
    finally:
        native.eval().requires_grad_(True)
    save(native, loaded.tokenizer, out)
    changed = {name: values - before[name] for name, values in _numbers(native).items() if (values != before[name]).any()}
    save_file(changed, out / DELTA)
    values = asdict(adaptation) | {"from": loaded.spec.name, "digest": loaded.digest, "changed": sorted(changed)}
    (out / "adaptation.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def add_delta(loaded: LoadedLing, file: Path) -> None:
    """Change a loaded model as an adaptation of it did; the sum is exact to float32 rounding.

    Raises:
        CheckpointError: The file names a tensor that the model does not have, or one of another shape.
    """
    own = loaded.native.state_dict()
    for name, change in load_file(file).items():
        if name not in own or own[name].shape != change.shape:
            found = f"shape {change.shape}" if name in own else "no such tensor"
            raise CheckpointError(f"{file}: {name} does not fit {loaded.spec.name} ({found}); use the model it was made from")
        own[name] += torch.from_numpy(change).to(own[name])


def tuned_parameters(native: LingForCausalLM, adaptation: Adaptation) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
    """What is tuned, each with a mask of what may move in it; None is all of it."""
    routers = [gate.weight for gate in gates(native).values()]
    if adaptation.tuned == "router":
        return [(weight, None) for weight in routers]
    if adaptation.tuned == "all":
        return [(parameter, None) for parameter in native.parameters()]
    if adaptation.tuned == "bias":
        return []
    return _drawn_experts(native, sum(weight.numel() for weight in routers), adaptation.seed)


def _drawn_experts(native: LingForCausalLM, least: int, seed: int) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
    """Experts of all layers in random order, until they hold at least so many parameters."""
    layers = [module for module in native.modules() if isinstance(module, LingExperts)]
    size = layers[0].gate_up_proj[0].numel() + layers[0].down_proj[0].numel()
    n_experts = layers[0].num_experts
    drawn = np.random.default_rng(seed).permutation(len(layers) * n_experts)[: -(-least // size)]
    found: list[tuple[nn.Parameter, torch.Tensor | None]] = []
    for place in sorted(set(drawn // n_experts)):
        mask = torch.zeros(n_experts, 1, 1)
        mask[drawn[drawn // n_experts == place] % n_experts] = 1.0
        found += [(layers[place].gate_up_proj, mask), (layers[place].down_proj, mask)]
    return found


def _tune(loaded: LoadedLing, batches: Iterator[Batch], adaptation: Adaptation) -> Iterator[dict[str, Any]]:
    native, tuned = loaded.native, tuned_parameters(loaded.native, adaptation)
    native.requires_grad_(False)
    for parameter, _ in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([parameter for parameter, _ in tuned], weight_decay=0.0) if tuned else None
    balancer = BiasBalancer(native, adaptation.bias_rate)
    done = 0
    with ExitStack() as stack:
        balancer.attach(stack)
        for step, batch in enumerate(islice(batches, adaptation.steps)):
            balancer.real = batch.real
            loss, solution = _loss(native, batch, train=optimizer is not None)
            if optimizer is not None:
                _move(optimizer, tuned, adaptation, step)
            counts = [layer.cpu().numpy().copy() for layer in balancer.counts]
            balancer.step()
            done = step + 1
            yield {"step": done, "loss": loss, "solution_loss": solution, "max_vio": max(_max_vio(layer) for layer in counts)}
    if done < adaptation.steps:
        raise UsageError(f"the problems ran out after {done} of {adaptation.steps} steps; give more of them, or fewer --steps")


def _loss(native: LingForCausalLM, batch: Batch, *, train: bool) -> tuple[float, float]:
    """Mean loss over solution tokens, and its gradients."""
    with torch.set_grad_enabled(train):
        total, solution = weighted_losses(native(input_ids=batch.input_ids, use_cache=False).logits, batch)
        mean = total / batch.label_weights.clamp(min=0).sum()
    if train:
        mean.backward()
    return float(mean.detach()), float(solution / (batch.label_weights == 1).sum())


def _move(
    optimizer: torch.optim.Optimizer, tuned: list[tuple[nn.Parameter, torch.Tensor | None]], adaptation: Adaptation, step: int
) -> None:
    for parameter, mask in tuned:
        if mask is not None and parameter.grad is not None:
            parameter.grad *= mask.to(parameter.grad)
    nn.utils.clip_grad_norm_([parameter for parameter, _ in tuned], adaptation.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = adaptation.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _batches(loaded: LoadedLing, problems: Iterable[Record], adaptation: Adaptation) -> Iterator[Batch]:
    items: list[tuple[list[int], int]] = []
    for record in problems:
        items.append(encode(record, loaded.tokenizer))
        if sum(len(ids) for ids, _ in items) >= adaptation.batch_tokens:
            yield collate(items, loaded.tokenizer.pad_token_id, 0.0).to(str(loaded.native.device))
            items = []


def _max_vio(counts: np.ndarray) -> float:
    return float(counts.max() / counts.mean() - 1)


def _numbers(native: LingForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in native.state_dict().items()}
