"""Does routing matter? One model on the same solutions, under its own router and with the router's choice replaced.

1. Read every gold solution teacher-forced, once with the model's own router; count each layer's load on the way.
2. Read it again under every other condition:

       random    K distinct experts per token and layer, each as likely as any other
       load      K distinct experts per token and layer, each as likely as the layer's own router chose it, whatever the token
       no-bias   the router's bias is zero: experts are chosen by score alone
       k=N       N experts are chosen instead of K, N from 1 to 2K or to as many as the kept groups hold

   and, where they are asked for,

       no-groups         experts of all groups may be chosen
       without rank N    the chosen expert with the N-th highest weight adds nothing; the other weights stay
       without busiest   the K experts of each layer with the highest load cannot be chosen
       without others N  nor can as many of its other experts, drawn anew for each N

3. Compare the next-token loss and the tokens right, problem by problem.

Only the choice changes. Weights follow by the official rule, whatever was chosen: the router's scores of these experts, divided
by their sum, times the scale. So a drawn expert is weighted as the router would weight it there. Drawn experts may come from
any group. All layers are changed at once, and every router sees what the changed layers before it made of the text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64, Int64

from ling_probe.benchmarks import Record
from ling_probe.capture import length_batches, read_sequence
from ling_probe.errors import UsageError
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingGate
from ling_probe.stats import bootstrap_weights, percentile_interval, wilson_interval

_LOSS_SLICE = 1024


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences of similar length [B, S], right-padded; causal attention keeps the padding from what is read."""

    places: list[int]
    """Of the rows, among all sequences."""
    lengths: list[int]
    input_ids: torch.Tensor
    scored: torch.Tensor
    """Positions whose next token belongs to the solution, its end included."""


Reroute = Callable[[_Batch], AbstractContextManager[None]]
"""Makes the change that lasts for the forward pass of one batch."""


@dataclass(frozen=True, eq=False)
class _Scores:
    """What one condition makes of every solution, by problem [N]."""

    loss: np.ndarray
    """Sum over the solution's tokens, in nats."""
    right: np.ndarray
    """Tokens that are the likeliest ones, given the solution so far."""


USUAL = ("random", "load", "no-bias", "k")
"""Conditions, by the first word of their names."""
FURTHER = ("no-groups", "without")


def rerouted_losses(
    loaded: LoadedLing,
    records: Iterable[Record],
    *,
    kinds: Sequence[str] = USUAL,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> pd.DataFrame:
    """What each condition does to the loss and to the solutions, for every family and for all together.

    Experts are drawn once per token, layer and condition, from a generator seeded by ``seed``, the layer and the problem's
    place, so batching changes no draw. Loss and accuracy are over all solution tokens, the end of the text included. Intervals
    are 95 %, from 1,000 bootstrap samples of problems drawn with ``seed``, the same samples for every condition. Costs one
    forward pass a condition.

    Args:
        loaded: The model; it is left as it was.
        records: Problems; those without a solution are left out.
        kinds: Of conditions beside ``true``, of `USUAL` and `FURTHER`.
        batch_tokens: Padded tokens of one forward pass.
        seed: Of the draws of experts and of the bootstrap.
        progress: Called with conditions done and their number.

    Returns:
        Rows of condition, family, problems, solution_tokens, loss (nats per token), loss_low, loss_high, token_accuracy, solved
        (problems with every token right, which greedy generation would reproduce letter by letter), share, ci_low, ci_high
        (Wilson), loss_increase (over ``true``, paired by problem), increase_low, increase_high.

    Raises:
        UsageError: No record has a solution.
    """
    usable = [record for record in records if record.solution]
    if not usable:
        raise UsageError("no record has a solution; the loss under other routers is measured on given solutions")
    sequences = [read_sequence(loaded, record) for record in usable]
    lengths = [len(sequence.ids) for sequence in sequences]
    batches = [
        _collate(places, [(sequences[i].ids, sequences[i].n_prompt) for i in places], loaded.native.device)
        for places in length_batches(lengths, batch_tokens)
    ]
    gates = loaded.gates()
    load = {layer: np.zeros(gate.n_experts, np.int64) for layer, gate in gates.items()}
    scores = {"true": _score(loaded, batches, partial(_counting, gates, load))}
    conditions = {name: made for name, made in _conditions(loaded, load, seed).items() if _kind(name) in kinds}
    for done, (name, reroute) in enumerate(conditions.items(), start=1):
        progress(done, len(conditions) + 1)
        scores[name] = _score(loaded, batches, reroute)
    tokens = np.array([len(sequence.ids) - sequence.n_prompt for sequence in sequences])
    members = _members([record.family for record in usable])
    samples = {family: bootstrap_weights(len(places), seed=seed) for family, places in members.items()}
    return pd.DataFrame(
        [
            {"condition": name} | _row(family, tokens[places], _of(found, places), _of(scores["true"], places), samples[family])
            for name, found in scores.items()
            for family, places in members.items()
        ]
    )


def draw_experts(counts: Int64[np.ndarray, " E"], k: int, noise: Float64[np.ndarray, "T E+1"]) -> Int64[torch.Tensor, "T K"]:
    """Draw `k` distinct experts for every token, expert e with probability ``k * counts[e] / counts.sum()`` exactly.

    Systematic sampling in random order (Madow 1949): lay the counts end to end in an order of the token's own, and take what
    lies at `k` points of equal distance, the first at random. With equal counts every set of `k` experts is equally likely.

    Args:
        counts: Whole numbers, their sum divisible by `k` and none above a `k`-th of it: tokens that chose an expert are such.
        k: Experts of a token.
        noise: Uniform in [0, 1): E values for the order, the last for the first point.
    """
    uniform = torch.from_numpy(noise)
    order = uniform[:, :-1].argsort(dim=1)
    ends = torch.from_numpy(counts)[order].cumsum(dim=1)
    distance = int(counts.sum()) // k
    points = (uniform[:, -1:] * distance).long() + distance * torch.arange(k)
    return order.gather(1, torch.searchsorted(ends, points, right=True))


def _conditions(loaded: LoadedLing, load: dict[int, np.ndarray], seed: int) -> dict[str, Reroute]:
    """The conditions after ``true``, by name; a dense model has none."""
    gates, spec = loaded.gates(), loaded.spec
    if not gates:
        return {}
    even = {layer: np.full(spec.n_experts, spec.top_k, np.int64) for layer in gates}
    no_bias = {layer: torch.zeros_like(gate.expert_bias) for layer, gate in gates.items()}
    found: dict[str, Reroute] = {
        "random": partial(_drawing, gates, even, seed),
        "load": partial(_drawing, gates, load, seed),
        "no-bias": partial(_replacing, gates, "expert_bias", no_bias),
    }
    for k in range(1, min(2 * spec.top_k, spec.topk_groups * spec.group_size) + 1):
        found[f"k={k}"] = partial(_replacing, gates, "top_k", dict.fromkeys(gates, k))
    found["no-groups"] = partial(_replacing, gates, "n_groups", dict.fromkeys(gates, 1))
    for rank in range(1, spec.top_k + 1):
        found[f"without rank {rank}"] = partial(_leaving_out, gates, rank)
    busiest = {layer: np.argsort(-counts, kind="stable")[: spec.top_k] for layer, counts in load.items()}
    found["without busiest"] = partial(_replacing, gates, "expert_bias", _barred(gates, busiest))
    for draw in range(1, OTHER_DRAWS + 1):
        rng = np.random.default_rng((seed, draw))
        others = {
            layer: rng.permutation(np.setdiff1d(np.arange(spec.n_experts), taken))[: spec.top_k]
            for layer, taken in busiest.items()
        }
        found[f"without others {draw}"] = partial(_replacing, gates, "expert_bias", _barred(gates, others))
    return found


OTHER_DRAWS = 5
"""How often experts are drawn to leave out, beside the busiest."""


def _kind(condition: str) -> str:
    return condition.split("=")[0].split(" ")[0]


def _barred(gates: dict[int, LingGate], experts: dict[int, np.ndarray]) -> dict[int, torch.Tensor]:
    """The bias of every gate, with which some experts are never chosen."""
    found = {}
    for layer, gate in gates.items():
        found[layer] = gate.expert_bias.clone()
        found[layer][torch.from_numpy(experts[layer]).to(gate.expert_bias.device)] = float("-inf")
    return found


@contextmanager
def _leaving_out(gates: dict[int, LingGate], rank: int, _batch: _Batch) -> Iterator[None]:
    """Give the chosen expert of one rank by weight, counted from 1, no weight."""

    def silence(_module: Any, _inputs: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        slot = out[1].argsort(dim=-1, descending=True, stable=True)[:, rank - 1 : rank]
        return (out[0], out[1].scatter(1, slot, 0.0), *out[2:])

    with ExitStack() as stack:
        for gate in gates.values():
            stack.callback(gate.register_forward_hook(silence).remove)
        yield


@contextmanager
def _counting(gates: dict[int, LingGate], load: dict[int, np.ndarray], batch: _Batch) -> Iterator[None]:
    """Add the choices of a batch's tokens, padding left out, to the load of each layer."""
    places = torch.arange(batch.input_ids.shape[1])
    real = (places < torch.tensor(batch.lengths)[:, None]).flatten()

    def count(layer: int, ids: torch.Tensor) -> None:
        load[layer] += np.bincount(ids.cpu()[real].flatten().numpy(), minlength=len(load[layer]))

    with ExitStack() as stack:
        for layer, gate in gates.items():
            handle = gate.expert_ids.register_forward_hook(lambda _m, _a, ids, layer=layer: count(layer, ids))
            stack.callback(handle.remove)
        yield


@contextmanager
def _drawing(gates: dict[int, LingGate], counts: dict[int, np.ndarray], seed: int, batch: _Batch) -> Iterator[None]:
    """Put drawn experts in the place of the chosen ones."""

    def draw(layer: int, ids: torch.Tensor) -> torch.Tensor:
        noise = np.zeros((*batch.input_ids.shape, len(counts[layer]) + 1))
        for row, (place, length) in enumerate(zip(batch.places, batch.lengths, strict=True)):
            noise[row, :length] = np.random.default_rng((seed, layer, place)).random((length, noise.shape[2]))
        return draw_experts(counts[layer], ids.shape[1], noise.reshape(len(ids), -1)).to(ids.device)

    with ExitStack() as stack:
        for layer, gate in gates.items():
            handle = gate.expert_ids.register_forward_hook(lambda _m, _a, ids, layer=layer: draw(layer, ids))
            stack.callback(handle.remove)
        yield


@contextmanager
def _replacing(gates: dict[int, LingGate], name: str, values: dict[int, Any], _batch: _Batch) -> Iterator[None]:
    """Give one attribute of every gate another value while the block runs."""
    before = {layer: getattr(gate, name) for layer, gate in gates.items()}
    try:
        for layer, gate in gates.items():
            setattr(gate, name, values[layer])
        yield
    finally:
        for layer, gate in gates.items():
            setattr(gate, name, before[layer])


def _collate(places: list[int], items: Sequence[tuple[list[int], int]], device: torch.device) -> _Batch:
    """A batch of token ids, each with the length of its prompt."""
    lengths = [len(ids) for ids, _ in items]
    input_ids = torch.zeros(len(items), max(lengths), dtype=torch.long)
    scored = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (ids, n_prompt) in enumerate(items):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        scored[row, n_prompt - 1 : len(ids) - 1] = True
    return _Batch(places, lengths, input_ids.to(device), scored.to(device))


@torch.no_grad()
def _score(loaded: LoadedLing, batches: Sequence[_Batch], reroute: Reroute) -> _Scores:
    loss, right = (np.zeros(sum(len(batch.places) for batch in batches)) for _ in range(2))
    for batch in batches:
        with reroute(batch):
            hidden = loaded.native.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.scored]
        targets = batch.input_ids.roll(-1, dims=1)[batch.scored]
        owner = np.array(batch.places)[batch.scored.nonzero()[:, 0].cpu().numpy()]
        for start in range(0, len(owner), _LOSS_SLICE):
            part = slice(start, start + _LOSS_SLICE)
            logits = loaded.native.lm_head(hidden[part]).float()
            losses = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
            np.add.at(loss, owner[part], losses.cpu().numpy())
            np.add.at(right, owner[part], (logits.argmax(-1) == targets[part]).cpu().numpy())
    return _Scores(loss, right)


def _members(families: Sequence[str]) -> dict[str, np.ndarray]:
    """Places of each family's problems, in order of name, and of all if there are several families."""
    members = {family: np.flatnonzero(np.array(families) == family) for family in sorted(set(families))}
    return members if len(members) == 1 else members | {"all": np.arange(len(families))}


def _of(scores: _Scores, places: np.ndarray) -> _Scores:
    return _Scores(scores.loss[places], scores.right[places])


def _row(family: str, tokens: np.ndarray, scores: _Scores, true: _Scores, samples: np.ndarray) -> dict[str, Any]:
    total, increase = int(tokens.sum()), scores.loss - true.loss
    solved = int((scores.right == tokens).sum())
    loss_low, loss_high = percentile_interval(samples @ scores.loss / (samples @ tokens))
    increase_low, increase_high = percentile_interval(samples @ increase / (samples @ tokens))
    low, high = wilson_interval(solved, len(tokens))
    return {
        "family": family,
        "problems": len(tokens),
        "solution_tokens": total,
        "loss": scores.loss.sum() / total,
        "loss_low": float(loss_low),
        "loss_high": float(loss_high),
        "token_accuracy": scores.right.sum() / total,
        "solved": solved,
        "share": solved / len(tokens),
        "ci_low": low,
        "ci_high": high,
        "loss_increase": increase.sum() / total,
        "increase_low": float(increase_low),
        "increase_high": float(increase_high),
    }
