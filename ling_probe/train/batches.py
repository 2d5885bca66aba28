"""Problems to tensors: an endless stream of stepbench with a curriculum, and the loss on a batch of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle, pairwise

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ling_probe.benchmarks import Record
from ling_probe.stepbench import FAMILIES, generate, shipped_prompts
from ling_probe.train.recipe import Recipe

IGNORED = -100


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
