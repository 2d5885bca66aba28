"""A large run made cheaply: each token id has a few choices of its own in every layer, drawn once by the real routing rule.

Load is skewed, routing follows the token, steps and families add their own: shapes and sizes are those of a real run of
Ling-mini-2.0 (19 routed layers, 8 of 256 experts in 8 groups), the meaning is made up.
"""

import numpy as np

from ling_probe.routing import route
from ling_probe.run import Run
from ling_probe.spec import ModelSpec
from ling_probe.trace import RoutingTrace, StepSpan

LABELS = ("plan", "recall", "add", "subtract", "multiply", "divide", "check", "conclude")
FAMILIES = ("arithmetic", "deduction", "causal")
VOCABULARY = 20_000
VARIANTS = 4
"""Choices that a token id has in a layer."""


def mini_spec() -> ModelSpec:
    """Geometry of Ling-mini-2.0, with a small vocabulary."""
    return ModelSpec(
        name="ling-mini-shape", n_layers=20, routed_layers=tuple(range(1, 20)), n_experts=256, top_k=8, n_groups=8,
        topk_groups=4, scale=2.5, n_shared=1, d_model=2048, vocab_size=VOCABULARY,
    )  # fmt: skip


def large_run(folder, n_tokens=1_000_000, *, length=250, steps=8, seed=0, per_part=200) -> Run:
    """A finished run of about `n_tokens` in sequences of `length` tokens each."""
    spec, rng = mini_spec(), np.random.default_rng(seed)
    pools = [_pool(spec, rng) for _ in spec.routed_layers]
    bias = {str(layer): [0.0] * spec.n_experts for layer in spec.routed_layers}
    run = Run.create(
        folder, spec=spec, model={"name": spec.name, "digest": "0" * 64, "expert_bias": bias},
        benchmark={"name": "synthetic", "split": "test"}, options={}, seed=seed,
    )  # fmt: skip
    frequency = 1 / np.arange(10, VOCABULARY + 10)
    frequency /= frequency.sum()
    numbers = np.arange(max(1, n_tokens // length))
    for some in np.array_split(numbers, -(-len(numbers) // per_part)):
        run.append([_trace(spec, rng, pools, frequency, int(number), length, steps) for number in some])
    run.finish({})
    return run


def _pool(spec, rng):
    """Ids and weights of every variant of every token id in one layer."""
    ids, weights = [], []
    skew = rng.normal(0, 0.7, spec.n_experts)
    for some in np.array_split(np.arange(VOCABULARY), 10):
        own = rng.normal(0, 1.0, (len(some), 1, spec.n_experts))
        logits = (own + rng.normal(0, 0.7, (len(some), VARIANTS, spec.n_experts)) + skew).reshape(-1, 1, spec.n_experts)
        routing = route(logits.astype(np.float32), np.zeros((1, spec.n_experts)), spec)
        ids.append(routing.ids.reshape(len(some), VARIANTS, spec.top_k).astype(np.uint8))
        weights.append(routing.weights.reshape(len(some), VARIANTS, spec.top_k).astype(np.float16))
    return np.concatenate(ids), np.concatenate(weights)


def _trace(spec, rng, pools, frequency, number, length, steps) -> RoutingTrace:
    tokens = rng.choice(VOCABULARY, length, p=frequency)
    prompt, answer = length // 5, 4
    bounds = np.linspace(prompt, length - answer, steps + 1).astype(int)
    step = np.full(length, -1, np.int16)
    labels = rng.choice(LABELS, steps)
    for place in range(steps):
        step[bounds[place] : bounds[place + 1]] = place
    segment = np.full(length, 1, np.uint8)
    segment[:prompt], segment[-answer:] = 0, 2
    # Neighbours share a variant for a while, as those of one sequence route alike.
    variant = np.repeat(rng.integers(0, VARIANTS, -(-length // 5)), 5)[:length]
    ids = np.stack([pool[0][tokens, variant] for pool in pools], axis=1)
    weights = np.stack([pool[1][tokens, variant] for pool in pools], axis=1).astype(np.float32)
    words = tuple(f" w{token}" for token in tokens)
    spans = tuple(
        StepSpan(
            step=place, label=str(labels[place]), text="", start=int(bounds[place]), stop=int(bounds[place + 1]), correct=None
        )
        for place in range(steps)
    )
    correct = bool(rng.random() < 0.7)
    loss = rng.exponential(1.0, length).astype(np.float32)
    loss[-1] = np.nan
    return RoutingTrace(
        spec=spec, sequence_id=f"problem-{number:06d}", token_ids=tokens.astype(np.int32), tokens=words, expert_ids=ids,
        weights=weights, segment=segment, step=step, loss=loss, steps=spans, benchmark="synthetic",
        family=FAMILIES[number % len(FAMILIES)], split="test", prompt="".join(words[:prompt]),
        completion="".join(words[prompt:]), answer="1", predicted="1" if correct else "0", correct=correct, meta={}, extras={},
    )  # fmt: skip
