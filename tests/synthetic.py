"""Small runs made up from random logits by the real routing rule, for every test that needs one.

Effects that make tokens of a run depend on each other are off unless asked for; `planted` is what an analysis must find.
"""

from dataclasses import dataclass

import numpy as np

from ling_probe.routing import route
from ling_probe.run import Run
from ling_probe.spec import ModelSpec
from ling_probe.trace import RoutingTrace, StepSpan

LABELS = {
    "arithmetic": ("add", "subtract", "multiply", "divide"),
    "deduction": ("premise", "modus-ponens", "negation"),
    "causal": ("premise", "add", "abduce", "intervene"),
}
PROMPT, REASONING, ANSWER, SPECIAL = range(4)


@dataclass(frozen=True)
class Planted:
    """Raise the router's logit of one expert at tokens of one step label, or of a whole family."""

    layer: int
    expert: int
    label: str
    boost: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Standard deviations of offsets added to the logits, each drawn per layer and expert."""

    token: float = 0.0
    """Per token id: routing follows the vocabulary."""
    step: float = 0.0
    """Per step: tokens of a step route alike."""
    sequence: float = 0.0
    """Per sequence: tokens of a sequence route alike."""
    confounded: bool = False
    """Whether each label has token ids of its own, so that labels and token ids cannot be told apart by raw rates."""


def synthetic_spec(**changes) -> ModelSpec:
    """16 experts in 4 groups, 4 of 2 groups chosen, in layers 1-3 of 4."""
    geometry = {
        "name": "synthetic",
        "n_layers": 4,
        "routed_layers": (1, 2, 3),
        "n_experts": 16,
        "top_k": 4,
        "n_groups": 4,
        "topk_groups": 2,
        "scale": 2.5,
        "n_shared": 1,
        "d_model": 8,
        "vocab_size": 64,
    }
    return ModelSpec(**(geometry | changes))


def synthetic_traces(
    spec: ModelSpec,
    n_sequences: int,
    *,
    rng: np.random.Generator,
    planted: Planted | tuple[Planted, ...] | None = None,
    effects: Effects | None = None,
    labels: dict[str, tuple[str, ...]] = LABELS,
    n_steps: tuple[int, int] = (3, 6),
    step_tokens: tuple[int, int] = (4, 9),
    keep: tuple[str, ...] = (),
) -> list[RoutingTrace]:
    """Traces with prompt, reasoning steps, answer and one special token; families take turns.

    Args:
        spec: Geometry to route with.
        n_sequences: How many.
        rng: Source of everything drawn.
        planted: Effects to find.
        effects: Dependence between tokens.
        labels: Step labels of each family.
        n_steps: Least and most steps of a sequence.
        step_tokens: Least and most tokens of a step.
        keep: "logits", "contribution", "shared", "residual" or "lens" as extras.
    """
    plants = planted if isinstance(planted, tuple) else (planted,) if planted else ()
    world = _World(spec, rng, effects or Effects(), plants, labels)
    families = list(labels)
    return [
        world.trace(number, families[number % len(families)], rng.integers(n_steps[0], n_steps[1] + 1), step_tokens, keep)
        for number in range(n_sequences)
    ]


def synthetic_run(folder, n_sequences=9, *, spec=None, seed=0, parts=2, finish=True, interventions=(), **options) -> Run:
    """A run of `synthetic_traces` spread over some parts; options go there."""
    spec = spec or synthetic_spec()
    run = Run.create(
        folder,
        spec=spec,
        model={
            "name": spec.name,
            "digest": "0" * 64,
            "verification": {"choices": 100, "differ": 0, "near_ties": 0},
            "expert_bias": synthetic_bias(spec, seed),
        },
        benchmark={"name": "synthetic", "split": "test", "digest": "1" * 64},
        options={},
        interventions=interventions,
        seed=seed,
    )
    traces = synthetic_traces(spec, n_sequences, rng=np.random.default_rng(seed), **options)
    for places in np.array_split(np.arange(n_sequences), parts):
        if len(places):
            run.append([traces[place] for place in places])
    if finish:
        run.finish({"accuracy": float(np.mean([trace.correct for trace in traces]))} if traces else {})
    return run


def synthetic_bias(spec, seed=0) -> dict[str, list[float]]:
    """The router's bias of a `synthetic_run`, as a manifest holds it."""
    bias = _World.draw_bias(spec, np.random.default_rng(seed))
    return {str(layer): row.tolist() for layer, row in zip(spec.routed_layers, bias, strict=True)}


class _World:
    """What all sequences of one call share: the bias, and how token ids route."""

    def __init__(self, spec, rng, effects, planted, labels) -> None:
        self.spec, self.rng, self.effects, self.planted = spec, rng, effects, planted
        self.shape = (spec.n_rows, spec.n_experts)
        self.bias = self.draw_bias(spec, rng)
        self.by_token = rng.normal(0, effects.token, (spec.vocab_size, *self.shape))
        names = sorted({label for family in labels.values() for label in family})
        self.vocabulary = dict(zip(names, np.array_split(np.arange(1, spec.vocab_size), len(names)), strict=True))
        self.labels = labels

    @staticmethod
    def draw_bias(spec, rng) -> np.ndarray:
        return rng.normal(0, 0.1, (spec.n_rows, spec.n_experts))

    def trace(self, number, family, n_steps, step_tokens, keep) -> RoutingTrace:
        rng, sequence_id = self.rng, f"{family}-{number:04d}"
        labels = [str(rng.choice(self.labels[family])) for _ in range(n_steps)]
        lengths = [int(rng.integers(3, 7)), *(int(rng.integers(step_tokens[0], step_tokens[1] + 1)) for _ in labels), 3, 1]
        bounds = np.cumsum([0, *lengths])
        segment = np.repeat([PROMPT, *([REASONING] * n_steps), ANSWER, SPECIAL], lengths).astype(np.uint8)
        step = np.repeat([-1, *range(n_steps), -1, -1], lengths).astype(np.int16)
        ids = self._token_ids(labels, lengths)
        tokens = tuple(f" w{token_id}" for token_id in ids)
        logits = self._logits(ids, step, labels, family)
        routing = route(logits, self.bias, self.spec)
        loss = rng.exponential(1.0, len(ids)).astype(np.float32)
        loss[-1] = np.nan
        spans = tuple(
            StepSpan(
                step=place,
                label=label,
                text="".join(tokens[bounds[place + 1] : bounds[place + 2]]),
                start=int(bounds[place + 1]),
                stop=int(bounds[place + 2]),
                correct=bool(rng.random() < 0.9),
            )
            for place, label in enumerate(labels)
        )
        correct, answer = bool(rng.random() < 0.75), str(rng.integers(100))
        return RoutingTrace(
            spec=self.spec,
            sequence_id=sequence_id,
            token_ids=ids.astype(np.int32),
            tokens=tokens,
            expert_ids=routing.ids,
            weights=routing.weights.astype(np.float32),
            segment=segment,
            step=step,
            loss=loss,
            steps=spans,
            benchmark="synthetic",
            family=family,
            split="test",
            prompt="".join(tokens[: bounds[1]]),
            completion="".join(tokens[bounds[1] : bounds[-2]]),
            answer=answer,
            predicted=answer if correct else "?",
            correct=correct,
            meta={"number": number, "difficulty": int(n_steps)},
            extras=self._extras(keep, logits, len(ids)),
        )

    def _token_ids(self, labels, lengths) -> np.ndarray:
        anything = np.arange(1, self.spec.vocab_size)
        pools = [
            anything,
            *(self.vocabulary[label] if self.effects.confounded else anything for label in labels),
            anything,
            [0],
        ]
        return np.concatenate([self.rng.choice(pool, length) for pool, length in zip(pools, lengths, strict=True)])

    def _logits(self, ids, step, labels, family) -> np.ndarray:
        """[T M E]; the offset of tokens in no step is drawn as if they were a step."""
        rng, effects = self.rng, self.effects
        logits = rng.normal(0, 1, (len(ids), *self.shape)) + self.by_token[ids]
        logits += rng.normal(0, effects.step, (len(labels) + 1, *self.shape))[step]
        logits += rng.normal(0, effects.sequence, self.shape)
        here = np.array([*labels, ""])[step]
        for plant in self.planted:
            where = (here == plant.label) | (family == plant.label)
            logits[where, self.spec.row(plant.layer), plant.expert] += plant.boost
        return logits

    def _extras(self, keep, logits, n_tokens) -> dict[str, np.ndarray]:
        rows, k = self.spec.n_rows, self.spec.top_k
        sizes = {"contribution": (rows, k), "shared": (rows,), "residual": (self.spec.n_layers,), "lens": (rows, k)}
        drawn = {name: self.rng.exponential(1.0, (n_tokens, *sizes[name])) for name in keep if name != "logits"}
        return drawn | ({"logits": logits.astype(np.float32)} if "logits" in keep else {})
