"""Train a small Ling 2.0 from scratch on stepbench, balanced the Ling way.

1. Draw problems of the three families in equal number, endless and never from a shipped split. A curriculum begins with few
   operations and only the premises that are needed: with many premises to choose from, looking one up is learned late.
2. Sort a pool of them by length and cut it into batches of about ``batch_tokens`` padded tokens.
3. Minimise the next-token loss: solution tokens count 1, prompt tokens ``prompt_weight`` (a random prompt is mostly noise).
4. After every step move each router's bias, without any auxiliary loss: with c the tokens an expert got,
   ``bias += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c)))`` (arXiv 2408.15664, as Ling 2.0 applies it).
5. Warm up, hold, and decay the learning rate linearly to zero; write a log line every ``log_every`` steps.

Routing and experts learn jointly from the first step. The result is saved in the original Ling layout with its tokenizer.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.metrics import dead_experts, max_vio
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.modeling import gates
from ling_probe.muon import Muon
from ling_probe.stepbench import FAMILIES, essential, shipped_prompts, train_records
from ling_probe.tokenizer import build_tokenizer

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights, apart from the library versions."""

    steps: int
    batch_tokens: int = 2048
    """Padded tokens per step."""
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    """Last part of the steps, over which the learning rate falls linearly to zero."""
    momentum: float = 0.95
    """Of Muon, which moves the matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW, which moves embeddings, head, routers and norms."""
    weight_decay: float = 0.1
    """On what Muon moves."""
    clip_norm: float = 1.0
    bias_rate: float = 1e-3
    """Step of the router bias."""
    prompt_weight: float = 0.1
    curriculum_steps: int = 1800
    """Steps over which problems grow from 2 operations to 6, and from the premises they need to all of them."""
    pool_batches: int = 16
    seed: int = 0
    log_every: int = 20
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of `LingConfig`; vocabulary and special tokens come from the tokenizer."""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a 0-based step: linear warm-up, plateau, linear decay to zero."""
        decay_steps = max(1, round(self.steps * self.decay_fraction))
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * min(up, (self.steps - step) / decay_steps)

    def hardest_at(self, step: int) -> int:
        """Most operations a training problem may have at a step, 2 to 6."""
        return 6 if step >= self.curriculum_steps else 2 + 4 * step // self.curriculum_steps

    def essential_share_at(self, step: int) -> float:
        """Share of problems that hold only the premises they need: all in the first third of the curriculum, none after it."""
        return min(1.0, max(0.0, 1.5 * (1 - step / self.curriculum_steps)))


# With a rotation base of 10,000 three of the eight frequencies turn less than one radian in 250 tokens; with 100 none does.
PRESETS: dict[str, Recipe] = {
    "ling-tiny": Recipe(
        steps=6500,
        architecture={
            "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "first_k_dense_replace": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.5,
            "num_experts": 32, "num_experts_per_tok": 4, "num_shared_experts": 1, "moe_intermediate_size": 48,
            "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "max_position_embeddings": 512, "rope_theta": 100.0,
            "initializer_range": 0.02,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids [B, S], next-token labels aligned with them, and a weight for each label."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """Which of the tokens are not padding [B, S]."""
        return self.label_weights >= 0


class BiasBalancer:
    """Counts what every router chooses and moves its bias against the excess (step 4)."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.gates = list(gates(model).values())
        self.real: torch.Tensor | None = None
        self._counts = [torch.zeros(gate.n_experts, device=gate.weight.device) for gate in self.gates]
        self.window = np.zeros((len(self.gates), self.gates[0].n_experts), dtype=np.int64)
        """Tokens per routed layer and expert since it was last zeroed [M, E]."""

    def attach(self, stack: ExitStack) -> None:
        """Count until the stack closes."""
        for row, gate in enumerate(self.gates):
            handle = gate.register_forward_hook(lambda _gate, _args, out, row=row: self._count(row, out[2]))
            stack.callback(handle.remove)

    def _count(self, row: int, ids: torch.Tensor) -> None:
        chosen = ids if self.real is None else ids[self.real.reshape(-1)]
        self._counts[row] += torch.bincount(chosen.reshape(-1), minlength=self._counts[row].numel())

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias once and start counting afresh."""
        for row, (gate, counts) in enumerate(zip(self.gates, self._counts, strict=True)):
            excess = torch.sign(counts.mean() - counts)
            gate.expert_bias += self.rate * (excess - excess.mean())
            self.window[row] += counts.long().cpu().numpy()
            counts.zero_()


def encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of prompt, solution and end of text, and how many of them are prompt."""
    prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
    solution = tokenizer(record.solution, add_special_tokens=False)["input_ids"]
    return [*prompt, *solution, tokenizer.eos_token_id], len(prompt)


def training_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """One batch per step, the same for the same recipe and tokenizer."""
    streams = [train_records(family, recipe.seed) for family in FAMILIES]
    rng = np.random.default_rng(recipe.seed)
    for start in range(0, recipe.steps, recipe.pool_batches):
        pool = _draw(streams, tokenizer, recipe, start, rng)
        batches = _cut(sorted(pool, key=lambda item: len(item[0])), recipe)
        order = rng.permutation(len(batches))
        for index in order[: min(recipe.pool_batches, recipe.steps - start)]:
            yield collate(batches[index], tokenizer.pad_token_id, recipe.prompt_weight)


def _draw(
    streams: list[Iterator[Record]], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, step: int, rng: np.random.Generator
) -> list[tuple[list[int], int]]:
    """Encoded problems for ``pool_batches`` batches, as hard as the curriculum allows at this step."""
    hardest, share = recipe.hardest_at(step), recipe.essential_share_at(step)
    pool: list[tuple[list[int], int]] = []
    drawn = 0
    while drawn < recipe.batch_tokens * recipe.pool_batches:
        for stream in streams:
            record = next(record for record in stream if record.meta["difficulty"] <= hardest)
            record = essential(record) if rng.random() < share else record
            if record.prompt not in shipped_prompts(record.family):
                pool.append(encode(record, tokenizer))
                drawn += len(pool[-1][0])
    return pool


def _cut(pool: list[tuple[list[int], int]], recipe: Recipe) -> list[list[tuple[list[int], int]]]:
    """Exactly ``pool_batches`` batches of neighbours in length, of about equal padded size."""
    sizes = np.cumsum([len(ids) for ids, _ in pool])
    edges = np.searchsorted(sizes, np.linspace(0, sizes[-1], recipe.pool_batches + 1)[1:-1])
    bounds = [0, *edges.tolist(), len(pool)]
    return [pool[a:b] for a, b in pairwise(bounds)]


def collate(items: list[tuple[list[int], int]], pad: int, prompt_weight: float) -> Batch:
    """Right-pad encoded records to one batch. Label weight is -1 at padding and 0 at a sequence's last token."""
    width = max(len(ids) for ids, _ in items)
    input_ids = torch.full((len(items), width), pad)
    labels = torch.full((len(items), width), IGNORED)
    weights = torch.full((len(items), width), -1.0)
    for row, (ids, prompt) in enumerate(items):
        n = len(ids)
        input_ids[row, :n] = torch.tensor(ids)
        labels[row, : n - 1] = torch.tensor(ids[1:])
        weights[row, : prompt - 1] = prompt_weight
        weights[row, prompt - 1 : n - 1] = 1.0
        weights[row, n - 1] = 0.0
    return Batch(input_ids, labels, weights)


def weighted_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean next-token loss in nats, and the plain mean over solution tokens."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    weights = batch.label_weights.flatten().clamp(min=0)
    solution = weights == 1
    return (losses * weights).sum() / weights.sum(), losses[solution].mean().detach()


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LingForCausalLM:
    """A freshly initialised model of the recipe's architecture, in float32."""
    torch.manual_seed(recipe.seed)
    config = LingConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        **recipe.architecture,
    )
    return LingForCausalLM(config)


def train(
    recipe: Recipe, out: Path, *, device: str = "cpu", snapshots: Sequence[float] = (), stop_after: int | None = None
) -> Iterator[dict[str, Any]]:
    """Train and save to ``out``; yields each log line as it is written to ``out/train.jsonl``.

    Args:
        recipe: What to train, on what, how long.
        out: A folder that does not exist yet.
        device: Where to compute.
        snapshots: Fractions of the steps after which a copy is saved to ``out/step-N``.
        stop_after: Steps after which to stop and save; the schedule stays the recipe's, so the losses are its first ones.

    Raises:
        UsageError: ``out`` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a new folder")
    build_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = new_model(recipe, tokenizer).to(device).train()
    marks = {max(1, round(fraction * recipe.steps)) for fraction in snapshots}
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    with (out / "train.jsonl").open("w") as log:
        for line in islice(_optimise(model, recipe, tokenizer, device), stop_after):
            if "loss" in line:
                log.write(json.dumps(line) + "\n")
                log.flush()
                yield line
            if line["step"] in marks:
                save(model, tokenizer, out / f"step-{line['step']}")
    save(model, tokenizer, out)


def _optimise(
    model: LingForCausalLM, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str
) -> Iterator[dict[str, Any]]:
    """One value per step: ``{"step": n}``, with the measured quantities every ``log_every`` steps."""
    optimizers = _optimizers(model, recipe)
    balancer = BiasBalancer(model, recipe.bias_rate)
    tokens, recent, started = 0, [], time.monotonic()
    with ExitStack() as stack:
        balancer.attach(stack)
        for step, batch in enumerate(training_batches(recipe, tokenizer)):
            batch = Batch(*(getattr(batch, name).to(device) for name in ("input_ids", "labels", "label_weights")))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate_at(step)
            balancer.real = batch.real
            loss, solution_loss = weighted_loss(model(input_ids=batch.input_ids, use_cache=False).logits, batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            balancer.step()
            tokens += int(batch.real.sum())
            recent.append((loss.item(), solution_loss.item(), float(norm)))
            line: dict[str, Any] = {"step": step + 1}
            if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps:
                line |= _measure(balancer, recent) | {
                    "tokens": tokens, "learning_rate": recipe.learning_rate_at(step),
                    "seconds": round(time.monotonic() - started, 1),
                }  # fmt: skip
                recent = []
            yield line


def _optimizers(model: LingForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, feed-forward networks and experts; AdamW for embeddings, head, routers and norms."""
    routers = {gate.weight for gate in gates(model).values()}
    outside = {model.model.embed_tokens.weight, model.lm_head.weight, *routers}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p not in outside]
    rest = [p for p in model.parameters() if p.ndim < 2 or p in outside]
    muon = Muon(matrices, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0, fused=True)
    return [muon, adam]


def _measure(balancer: BiasBalancer, recent: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Means since the last line, and the load of every routed layer over the same steps; the window is zeroed."""
    loss, solution_loss, norm = np.mean(recent, axis=0)
    measured = {
        "loss": round(float(loss), 5),
        "solution_loss": round(float(solution_loss), 5),
        "grad_norm": round(float(norm), 4),
        "max_vio": [round(float(v), 4) for v in max_vio(balancer.window)],
        "dead": dead_experts(balancer.window).tolist(),
        "bias_range": [round(float(gate.expert_bias.max() - gate.expert_bias.min()), 5) for gate in balancer.gates],
    }
    balancer.window[:] = 0
    return measured


def save(model: LingForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the original Ling layout with its tokenizer; the weights rounded to ``dtype``, the bias kept float32."""
    copy = LingForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
