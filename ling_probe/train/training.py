"""The run from a recipe to a checkpoint folder."""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ling_probe.errors import UsageError
from ling_probe.metrics import dead_experts, max_vio
from ling_probe.model import LingConfig, LingForCausalLM
from ling_probe.model.files import find_checkpoint
from ling_probe.model.modeling import gates
from ling_probe.muon import Muon
from ling_probe.spawning import nobodys_main
from ling_probe.tokenizer import build_tokenizer
from ling_probe.train.balance import BiasBalancer
from ling_probe.train.batches import Batch, training_batches, weighted_losses
from ling_probe.train.recipe import Recipe
from ling_probe.train.team import ALONE, PATIENCE, Team


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


def save(model: LingForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the original Ling layout with its tokenizer; the weights rounded to ``dtype``, the bias kept float32."""
    copy = LingForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
