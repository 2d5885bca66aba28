"""Train a small Ling 2.0 from scratch on stepbench, balanced the Ling way.

1. Draw problems of the three families in equal number, endless and never from a shipped split. A curriculum begins with few
   operations and bare problems: with many premises to choose from, looking one up is learned late.
2. Gather ``batch_tokens`` tokens of problems for a step, all families mixed, and compute them in parts of about equal length.
3. Minimise the next-token loss: solution tokens count 1, prompt tokens ``prompt_weight`` (a random prompt is mostly noise).
4. After every step move each router's bias, without any auxiliary loss: with c the tokens an expert got,
   ``bias += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c)))`` (arXiv 2408.15664, as Ling 2.0 applies it).
5. Warm up, hold, and decay the learning rate linearly to zero; write a log line every ``log_every`` steps.

Routing and experts learn jointly from the first step. The result is saved in the original Ling layout with its tokenizer.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, cycle, islice, pairwise
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ling_probe.benchmarks import Record
from ling_probe.errors import UsageError
from ling_probe.metrics import dead_experts, max_vio
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.files import find_checkpoint
from ling_probe.model.modeling import gates
from ling_probe.muon import Muon
from ling_probe.spawning import nobodys_main
from ling_probe.stepbench import FAMILIES, generate, shipped_prompts
from ling_probe.tokenizer import build_tokenizer

IGNORED = -100
PATIENCE = 300.0
"""Seconds that a worker waits for the others before it takes one for lost."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights, apart from the library versions."""

    steps: int
    batch_tokens: int = 3072
    """Tokens per step."""
    parts: int = 2
    """Parts of neighbours in length that a step's batch is computed in, so that little is padding."""
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
    curriculum_steps: int = 600
    """Steps over which problems grow from 2 operations to 6, and from bare ones to full ones."""
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

    def bare_share_at(self, step: int) -> float:
        """Share of bare problems: all in the first third of the curriculum, none after it."""
        return min(1.0, max(0.0, 1.5 * (1 - step / self.curriculum_steps))) if self.curriculum_steps else 0.0


# With a rotation base of 10,000 three of the eight frequencies turn less than one radian in 250 tokens; with 100 none does.
_TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.5,
    "num_experts": 32, "num_experts_per_tok": 4, "num_shared_experts": 1, "moe_intermediate_size": 48,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "max_position_embeddings": 512, "rope_theta": 100.0,
    "initializer_range": 0.02,
}  # fmt: skip
_SCALED: dict[str, dict[str, Any]] = {
    # Five dense layers of this width have the active parameters of ling-tiny, up to 0.1 %.
    "tiny-dense": {"first_k_dense_replace": 5, "intermediate_size": 277},
    "tiny-16": {"num_experts": 16},
    "tiny-32": {},
    "tiny-64": {"num_experts": 64},
}
"""What differs from ling-tiny in the four small runs that ask what more experts bring at the same compute per token."""
PRESETS: dict[str, Recipe] = {
    "ling-tiny": Recipe(steps=7600, architecture=_TINY),
    # Goes on from ling-tiny's weights: the same problems once more at a third of the learning rate, down to zero.
    "ling-tiny-finish": Recipe(
        steps=1200, learning_rate=1e-3, warmup_steps=100, decay_fraction=0.75, curriculum_steps=0, seed=1, architecture=_TINY
    ),
    **{
        name: Recipe(steps=800, warmup_steps=100, curriculum_steps=200, architecture=_TINY | changed)
        for name, changed in _SCALED.items()
    },
}


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

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.label_weights.to(device))


class Team:
    """The worker processes that share one training run; each computes some parts of every batch and moves some matrices.

    Only the time differs from working alone: gradients are sums over all parts, up to the order of summation. The workers
    meet in shared memory, one row each, and everybody adds the rows in the same order: they stay equal to the last bit.
    """

    def __init__(self, rank: int = 0, size: int = 1, rows: torch.Tensor | None = None, barrier: Barrier | None = None) -> None:
        self.rank, self.size, self.rows, self.barrier = rank, size, rows, barrier

    @torch.no_grad()
    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the team."""
        if self.size == 1:
            return
        with self._published(tensors) as rows:
            _unpack(rows.sum(0), tensors)

    @torch.no_grad()
    def share(self, shares: Sequence[Sequence[torch.Tensor]]) -> None:
        """Give everybody the tensors that each worker has moved."""
        if self.size == 1:
            return
        with self._published(shares[self.rank]) as rows:
            for row, tensors in zip(rows, shares, strict=True):
                _unpack(row, tensors)

    @contextmanager
    def _published(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What everybody wrote, until everybody has read it."""
        assert self.rows is not None
        assert self.barrier is not None
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.rows[self.rank, : flat.numel()] = flat
        self.barrier.wait(PATIENCE)
        yield self.rows
        self.barrier.wait(PATIENCE)


def _unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


ALONE = Team()


class BiasBalancer:
    """Counts what every router chooses and moves its bias against the excess (step 4)."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.gates = list(gates(model).values())
        self.real: torch.Tensor | None = None
        self.counts = [torch.zeros(gate.n_experts, device=gate.weight.device) for gate in self.gates]
        self.window = np.zeros((len(self.gates), self.gates[0].n_experts if self.gates else 1), dtype=np.int64)
        """Tokens per routed layer and expert since it was last zeroed [M, E]; a dense model has no routed layer."""

    def attach(self, stack: ExitStack) -> None:
        """Count until the stack closes."""
        for row, gate in enumerate(self.gates):
            handle = gate.register_forward_hook(lambda _gate, _args, out, row=row: self._count(row, out[2]))
            stack.callback(handle.remove)

    def _count(self, row: int, ids: torch.Tensor) -> None:
        chosen = ids if self.real is None else ids[self.real.reshape(-1)]
        self.counts[row] += torch.bincount(chosen.reshape(-1), minlength=self.counts[row].numel())

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias once and start counting afresh."""
        for row, (gate, counts) in enumerate(zip(self.gates, self.counts, strict=True)):
            excess = torch.sign(counts.mean() - counts)
            gate.expert_bias += self.rate * (excess - excess.mean())
            self.window[row] += counts.long().cpu().numpy()
            counts.zero_()


def encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of prompt, solution and end of text, and how many of them are prompt."""
    prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
    solution = tokenizer(record.solution, add_special_tokens=False)["input_ids"]
    return [*prompt, *solution, tokenizer.eos_token_id], len(prompt)


def training_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Batch]]:
    """The parts of one step's batch, for every step; the same for the same recipe and tokenizer."""
    indices = {family: count() for family in FAMILIES}
    rng = np.random.default_rng(recipe.seed)
    families = cycle(FAMILIES)
    for step in range(recipe.steps):
        problems: list[tuple[list[int], int]] = []
        drawn = 0
        while drawn < recipe.batch_tokens:
            family, bare = next(families), rng.random() < recipe.bare_share_at(step)
            record = _problem(family, indices[family], recipe.seed, hardest=recipe.hardest_at(step), bare=bool(bare))
            problems.append(encode(record, tokenizer))
            drawn += len(problems[-1][0])
        parts = _cut(sorted(problems, key=lambda item: len(item[0])), recipe.parts)
        yield [collate(part, tokenizer.pad_token_id, recipe.prompt_weight) for part in parts]


def _problem(family: str, indices: Iterator[int], seed: int, *, hardest: int, bare: bool) -> Record:
    """The next problem of the training stream that is no harder than allowed and no shipped one."""
    for index in indices:
        record = generate(family, "train", index, seed, bare=bare)
        if record.meta["difficulty"] <= hardest and record.prompt not in shipped_prompts(family):
            return record
    raise AssertionError("indices end")


def _cut(problems: list[tuple[list[int], int]], parts: int) -> list[list[tuple[list[int], int]]]:
    """Neighbours in length together, in parts of about equal size and none empty."""
    sizes = np.cumsum([len(ids) for ids, _ in problems])
    edges = np.searchsorted(sizes, np.linspace(0, sizes[-1], parts + 1)[1:-1])
    bounds = [0, *edges.tolist(), len(problems)]
    return [problems[a:b] for a, b in pairwise(bounds) if a < b]


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


def weighted_losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the weighted next-token losses in nats, and the plain sum over solution tokens."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    weights = batch.label_weights.flatten().clamp(min=0)
    return (losses * weights).sum(), losses[weights == 1].sum().detach()


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, start: Path | None = None) -> LingForCausalLM:
    """A model of the recipe's architecture in float32, freshly initialised or with the weights of a checkpoint folder."""
    torch.manual_seed(recipe.seed)
    size = -(-len(tokenizer) // 64) * 64
    model = LingForCausalLM(new_config(recipe, size, tokenizer.pad_token_id, tokenizer.eos_token_id))
    if start is not None:
        model.load_state_dict(LingForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
    return model


def new_config(recipe: Recipe, vocab_size: int, pad_token_id: int = 0, eos_token_id: int = 0) -> LingConfig:
    """The configuration of the recipe's architecture with a vocabulary of so many tokens."""
    return LingConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        **recipe.architecture,
    )


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    start: Path | None = None,
    snapshots: Sequence[float] = (),
    stop_after: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Train and save to ``out``; yields each log line as it is written to ``out/train.jsonl``.

    Args:
        recipe: What to train, on what, how long.
        out: A folder that does not exist yet.
        device: Where to compute.
        workers: Processes that share the work on a CPU, one thread each; the recipe's parts are dealt out among them.
        start: A checkpoint folder that this function made, whose weights to go on from, with optimisers that know nothing of
            it. Its log and recipe become the beginning of the new ones, and steps and tokens count on.
        snapshots: Fractions of the steps after which a copy is saved to ``out/step-N``.
        stop_after: Steps after which to stop and save; the schedule stays the recipe's, so the losses are its first ones.

    Raises:
        UsageError: ``out`` exists, more workers than there is work for, or a start that is none.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a new folder")
    if not 1 <= workers <= (recipe.parts if device == "cpu" else 1):
        raise UsageError(
            f"{workers} workers on {device} for {recipe.parts} parts a batch; give 1, on the CPU at most one a part"
        )
    before = _Before.read(start, recipe)
    build_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    marks = {max(1, round(fraction * recipe.steps)) for fraction in snapshots}
    (out / "recipe.json").write_text(json.dumps(before.recipe | asdict(recipe), indent=2) + "\n")
    model = new_model(recipe, tokenizer, start).to(device).train()
    numbers = sum(tensor.numel() for tensor in model.state_dict().values()) + 2
    with _team(workers, recipe, out, start, stop_after, numbers) as team, (out / "train.jsonl").open("w") as log:
        log.write(before.log)
        for line in islice(_optimise(model, recipe, tokenizer, device, team), stop_after):
            step = before.counts["step"] + line["step"]
            if "loss" in line:
                counted = line | {name: round(already + line[name], 1) for name, already in before.counts.items()}
                log.write(json.dumps(counted) + "\n")
                log.flush()
                yield counted
            if line["step"] in marks:
                save(model, tokenizer, out / f"step-{step}")
    save(model, tokenizer, out)


@dataclass(frozen=True)
class _Before:
    """What the training of a checkpoint leaves to one that goes on from it."""

    log: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=lambda: {"step": 0, "tokens": 0, "seconds": 0.0})

    @classmethod
    def read(cls, start: Path | None, recipe: Recipe) -> "_Before":
        """The log, recipe and counts of a checkpoint folder; without one, of nothing.

        Raises:
            UsageError: `train` did not make the folder, or made it with another architecture.
            CheckpointError: Its weights are missing or truncated.
        """
        if start is None:
            return cls()
        try:
            log, recorded = ((start / name).read_text(encoding="utf-8") for name in ("train.jsonl", "recipe.json"))
            last, earlier = json.loads(log.splitlines()[-1]), json.loads(recorded)
            counts = {name: last[name] for name in ("step", "tokens", "seconds")}
            architecture = earlier["architecture"]
        except (OSError, ValueError, LookupError, TypeError):
            raise UsageError(
                f"{start} has no train.jsonl and recipe.json that can be read; start from what train made"
            ) from None
        if architecture != recipe.architecture:
            raise UsageError(f"{start} was trained with another architecture than the recipe's; start from one that has it")
        find_checkpoint(start)  # whole, before anything is written
        return cls(log, {"before": earlier}, counts)


@contextmanager
def _team(workers: int, recipe: Recipe, out: Path, start: Path | None, stop_after: int | None, numbers: int) -> Iterator[Team]:
    """The process that calls this as the first of a team, the others started beside it."""
    if workers == 1:
        yield ALONE
        return
    spawning = multiprocessing.get_context("spawn")
    memory, barrier = RawArray("f", workers * numbers), spawning.Barrier(workers)
    helpers = [
        spawning.Process(target=_help, args=(rank, workers, memory, barrier, recipe, out, start, stop_after), daemon=True)
        for rank in range(1, workers)
    ]
    threads = torch.get_num_threads()
    try:
        with nobodys_main():
            for helper in helpers:
                helper.start()
        yield _join(0, workers, memory, barrier)
        for helper in helpers:
            helper.join()
    except BrokenBarrierError:
        raise UsageError(
            f"a worker of {workers} stopped or was not heard of for {PATIENCE:.0f} s (see above); "
            "give fewer --workers, or free memory"
        ) from None
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            helper.kill()


def _join(rank: int, size: int, memory: Any, barrier: Barrier) -> Team:
    torch.set_num_threads(1)
    return Team(rank, size, torch.frombuffer(memory, dtype=torch.float32).view(size, -1), barrier)


def _help(
    rank: int, size: int, memory: Any, barrier: Barrier, recipe: Recipe, out: Path, start: Path | None, stop_after: int | None
) -> None:
    """What every process but the first does: the same steps, without log or files."""
    try:
        team = _join(rank, size, memory, barrier)
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = new_model(recipe, tokenizer, start).train()
        for _ in islice(_optimise(model, recipe, tokenizer, "cpu", team), stop_after):
            pass
    except BaseException:
        barrier.abort()
        raise


def _optimise(
    model: LingForCausalLM, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: str, team: Team = ALONE
) -> Iterator[dict[str, Any]]:
    """One value per step: ``{"step": n}``, with the measured quantities every ``log_every`` steps."""
    optimizers, moved = _optimizers(model, recipe, team)
    balancer = BiasBalancer(model, recipe.bias_rate)
    tokens, recent, started = 0, [], time.monotonic()
    with ExitStack() as stack:
        balancer.attach(stack)
        for step, parts in enumerate(training_batches(recipe, tokenizer)):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate_at(step)
            losses = _accumulate(model, balancer, [part.to(device) for part in parts], team)
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            team.share(moved)
            model.zero_grad(set_to_none=True)
            balancer.step()
            tokens += sum(int(part.real.sum()) for part in parts)
            recent.append((*losses, float(norm)))
            line: dict[str, Any] = {"step": step + 1}
            if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps:
                line |= _measure(balancer, recent) | {
                    "tokens": tokens, "learning_rate": recipe.learning_rate_at(step),
                    "seconds": round(time.monotonic() - started, 1),
                }  # fmt: skip
                recent = []
            yield line


def _accumulate(
    model: LingForCausalLM, balancer: BiasBalancer, parts: Sequence[Batch], team: Team = ALONE
) -> tuple[float, float]:
    """Gradients of the weighted mean loss over all parts, and the load; returns that loss and the mean over solution tokens."""
    weight = sum(float(part.label_weights.clamp(min=0).sum()) for part in parts)
    solution = sum(int((part.label_weights == 1).sum()) for part in parts)
    totals = torch.zeros(2)
    for part in parts[team.rank :: team.size]:
        balancer.real = part.real
        loss, solution_loss = weighted_losses(model(input_ids=part.input_ids, use_cache=False).logits, part)
        (loss / weight).backward()
        totals += torch.stack((loss.detach(), solution_loss)).cpu()
    team.add([*(p.grad for p in model.parameters() if p.grad is not None), *balancer.counts, totals])
    return totals[0].item() / weight, totals[1].item() / solution


def _optimizers(
    model: LingForCausalLM, recipe: Recipe, team: Team = ALONE
) -> tuple[list[torch.optim.Optimizer], list[list[nn.Parameter]]]:
    """Muon for the matrices of attention, feed-forward networks and experts; AdamW for embeddings, head, routers and norms.

    The workers of a team move a share of the matrices each; second come the matrices by worker.
    """
    routers = {gate.weight for gate in gates(model).values()}
    outside = {model.model.embed_tokens.weight, model.lm_head.weight, *routers}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p not in outside]
    rest = [p for p in model.parameters() if p.ndim < 2 or p in outside]
    shares = [matrices[rank :: team.size] for rank in range(team.size)]
    muon = Muon(shares[team.rank], lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0, fused=True)
    return [muon, adam], shares


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
