"""Synthetic runs by the hundred: whole runs drawn as arrays, routed by the real rule, kept in memory.

A `World` fixes how experts, words and labels behave; `World.run(seed)` draws problems from it. The logit of an expert for a
token is the sum of

    skew       of the expert: uneven load
    token      of the token id and expert: routing follows the words
    trend      of the expert, times the place in the sequence (0 to 1): routing changes towards the end
    sequence   of the problem and expert: tokens of a problem route alike
    drift      an AR(1) process along the sequence, per expert: neighbours route alike
    noise      of each token and expert
    plants     of a label, or family, and expert: what an analysis must find

and none but the last looks at a label. Labels are drawn by family, independently for every step, so given its words and its
place a step's routing says nothing about its label. With `words` above 0 each label has words that it uses more.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import signal

from ling_probe.routing import route
from ling_probe.run import Run, TokenBatch
from ling_probe.run.manifest import FILES, Manifest, Part
from ling_probe.spec import ModelSpec
from ling_probe.trace import RoutingTrace, StepSpan

LABELS = {
    "arithmetic": ("add", "subtract", "multiply", "divide"),
    "deduction": ("premise", "modus-ponens", "negation"),
    "causal": ("premise", "add", "abduce", "intervene"),
}
NAMES = tuple(sorted({label for labels in LABELS.values() for label in labels}))
PROMPT, REASONING, ANSWER, SPECIAL = range(4)
SPEC = ModelSpec(
    name="synthetic", n_layers=4, routed_layers=(1, 2, 3), n_experts=16, top_k=4, n_groups=4, topk_groups=2, scale=2.5,
    n_shared=1, d_model=8, vocab_size=64,
)  # fmt: skip


@dataclass(frozen=True)
class Plant:
    """A logit raised for one expert at tokens of one step label, or of a whole family."""

    layer: int
    expert: int
    label: str
    boost: float


@dataclass(frozen=True, kw_only=True)
class World:
    """Standard deviations of what adds to the logits, and the rest of how runs are drawn."""

    bias: float = 0.05
    """Of the router, which moves choices and no weights."""
    skew: float = 0.5
    token: float = 1.0
    trend: float = 0.5
    sequence: float = 0.4
    drift: float = 0.7
    persistence: float = 0.9
    """Correlation of the drift from a token to the next."""
    noise: float = 0.7
    words: float = 0.0
    """Standard deviation over labels of the log frequency of a word: 0 uses the same words everywhere."""
    ordered: bool = False
    """Labels of a problem in alphabetical order: they then go with the place in the solution."""
    longer_is_harder: float = 0.0
    """How much the log odds of a right answer fall for each step more than the mean."""
    plants: tuple[Plant, ...] = ()
    n_sequences: int = 48
    steps: tuple[int, int] = (3, 7)
    step_tokens: tuple[int, int] = (4, 12)
    spec: ModelSpec = SPEC
    seed: int = 0
    """Of what is fixed: biases, skews, words. Runs have seeds of their own."""

    @cached_property
    def fixed(self) -> "Fixed":
        """What all runs of this world share."""
        spec, rng = self.spec, np.random.default_rng(self.seed)
        shape = (spec.n_rows, spec.n_experts)
        frequency = -np.log(np.arange(3, spec.vocab_size + 2)) + rng.normal(0, 1, (len(NAMES) + 1, spec.vocab_size - 1)) * (
            self.words * (np.arange(len(NAMES) + 1) < len(NAMES))[:, None]
        )
        share = np.exp(frequency)
        return Fixed(
            bias=rng.normal(0, self.bias, shape),
            skew=rng.normal(0, self.skew, shape),
            token=rng.normal(0, self.token, (spec.vocab_size, *shape)),
            trend=rng.normal(0, self.trend, shape),
            cumulative=np.cumsum(share / share.sum(axis=1, keepdims=True), axis=1),
        )

    def run(self, seed: int, *, routing: int = 0) -> "MemoryRun":
        """A run drawn from this world; one of another `routing` has the same problems and text, and routes them anew."""
        return MemoryRun(self, Path(f"memory-{seed}-{routing}"), *_draw(self, seed, routing))


@dataclass(frozen=True)
class Fixed:
    """What all runs of a world share."""

    bias: np.ndarray
    skew: np.ndarray
    token: np.ndarray
    trend: np.ndarray
    cumulative: np.ndarray
    """Of word frequencies, by label; the last row is for tokens in no step."""


class MemoryRun(Run):
    """A run that was never written: what analyses read of one, from arrays."""

    def __init__(self, world: World, folder: Path, sequences: pd.DataFrame, steps: pd.DataFrame, tokens: TokenBatch) -> None:
        part = Part(
            name="00000", sequences=len(sequences), steps=len(steps), tokens=len(tokens.position), extras=("logits",),
            files=dict.fromkeys(FILES, ""),
        )  # fmt: skip
        biases = {str(layer): row.tolist() for layer, row in zip(world.spec.routed_layers, world.fixed.bias, strict=True)}
        manifest = Manifest(
            created="", state="complete", spec=world.spec, model={"name": "synthetic", "expert_bias": biases},
            benchmark={"name": "synthetic", "split": "test"}, options={}, versions={}, parts=(part,),
        )  # fmt: skip
        super().__init__(folder, manifest)
        self._sequences, self._table_of_steps, self._tokens = sequences, steps, tokens

    @property
    def steps(self) -> pd.DataFrame:
        """As of a run on disk."""
        return self._table_of_steps.copy()

    def batches(self, *, layers=None, weights=False, columns=(), parts=None) -> Iterator[TokenBatch]:
        """As of a run on disk, of one part."""
        whole, rows = self._tokens, [self.spec.row(layer) for layer in (self.spec.routed_layers if layers is None else layers)]
        extra = {name: whole.extra[name][:, rows] if name == "logits" else whole.extra[name] for name in columns}
        for _ in (0,) if parts is None else parts:
            yield replace(
                whole, expert_ids=whole.expert_ids[:, rows], weights=whole.weights[:, rows] if weights else None, extra=extra
            )

    def traces(self) -> list[RoutingTrace]:
        """The same run as traces that can be written."""
        tokens, spans = self._tokens, self._table_of_steps.drop(columns="sequence")
        traces = []
        for number, row in self.sequences.iterrows():
            here = tokens.sequence == number
            mine = spans[self._table_of_steps["sequence"] == number]
            traces.append(
                RoutingTrace(
                    spec=self.spec, token_ids=tokens.token_id[here], tokens=tuple(tokens.extra["token"][here]),
                    expert_ids=tokens.expert_ids[here], weights=tokens.weights[here], segment=tokens.segment[here],
                    step=tokens.step[here], loss=tokens.extra["loss"][here],
                    steps=tuple(StepSpan(**span) for span in mine.to_dict("records")),
                    **{**row.to_dict(), "meta": json.loads(row["meta"])}, extras={"logits": tokens.extra["logits"][here]},
                )
            )  # fmt: skip
        return traces


@dataclass(frozen=True)
class _Layout:
    """Pieces (prompt, steps, answer, end) of all sequences, in order, and the tokens they hold."""

    family: np.ndarray
    """Of each sequence, an index into `LABELS`."""
    piece_sequence: np.ndarray
    piece_step: np.ndarray
    """-1 for what is no step."""
    piece_label: np.ndarray
    """An index into `NAMES`; its length for what is no step."""
    piece_segment: np.ndarray
    length: np.ndarray
    piece: np.ndarray = field(init=False)
    """Of each token."""
    sequence: np.ndarray = field(init=False)
    position: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        piece = np.repeat(np.arange(len(self.length)), self.length)
        sequence = self.piece_sequence[piece]
        position = np.arange(len(piece)) - np.searchsorted(sequence, sequence)
        for name, value in (("piece", piece), ("sequence", sequence), ("position", position)):
            object.__setattr__(self, name, value)

    @property
    def label(self) -> np.ndarray:
        """Of each token."""
        return self.piece_label[self.piece]


def _draw(world: World, seed: int, routing_seed: int) -> tuple[pd.DataFrame, pd.DataFrame, TokenBatch]:
    rng = np.random.default_rng([world.seed, seed])
    layout = _layout(world, rng)
    token_id = _words(world, layout, rng)
    logits = _logits(world, layout, token_id, np.random.default_rng([world.seed, seed, routing_seed + 1]))
    routing = route(logits, world.fixed.bias, world.spec)
    words = np.char.add(" w", token_id.astype(str)).astype(object)
    loss = rng.exponential(1.0, len(token_id)).astype(np.float32)
    loss[np.r_[layout.sequence[1:] != layout.sequence[:-1], True]] = np.nan
    sequences, steps = _sequences(world, seed, layout, rng, words), _steps(layout, rng, words)
    tokens = TokenBatch(
        sequence=layout.sequence.astype(np.int32), position=layout.position.astype(np.int32),
        token_id=token_id.astype(np.int32), segment=layout.piece_segment[layout.piece].astype(np.uint8),
        step=layout.piece_step[layout.piece].astype(np.int16), expert_ids=routing.ids,
        weights=routing.weights.astype(np.float16).astype(np.float32),
        extra={
            "logits": logits.astype(np.float16).astype(np.float32), "loss": loss, "token": words,
            "sequence_id": sequences["sequence_id"].to_numpy()[layout.sequence],
        },
    )  # fmt: skip
    return sequences, steps, tokens


def _layout(world: World, rng: np.random.Generator) -> _Layout:
    n_steps = rng.integers(world.steps[0], world.steps[1] + 1, world.n_sequences)
    family = np.arange(world.n_sequences) % len(LABELS)
    sequence = np.repeat(np.arange(world.n_sequences), n_steps + 3)
    place = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
    last = n_steps[sequence] + 2 - place
    segment = np.select([place == 0, last == 0, last == 1], [PROMPT, SPECIAL, ANSWER], REASONING)
    is_step = segment == REASONING
    length = rng.integers(world.step_tokens[0], world.step_tokens[1] + 1, len(sequence))
    length = np.select([segment == PROMPT, segment == SPECIAL, segment == ANSWER], [length + 4, 1, 3], length)
    known = [[NAMES.index(label) for label in labels] for labels in LABELS.values()]
    label = np.full(len(sequence), len(NAMES))
    for number, codes in enumerate(known):
        mine = is_step & (family[sequence] == number)
        label[mine] = rng.choice(codes, mine.sum())
    if world.ordered:
        label[is_step] = label[is_step][np.lexsort((label[is_step], sequence[is_step]))]
    return _Layout(family, sequence, np.where(is_step, place - 1, -1), label, segment, length)


def _words(world: World, layout: _Layout, rng: np.random.Generator) -> np.ndarray:
    below = world.fixed.cumulative[layout.label] < rng.random(len(layout.label))[:, None]
    special = layout.piece_segment[layout.piece] == SPECIAL
    return np.where(special, 0, 1 + below[:, :-1].sum(axis=1))


def _logits(world: World, layout: _Layout, token_id: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    fixed, shape, n_tokens = world.fixed, (world.spec.n_rows, world.spec.n_experts), len(token_id)
    n_positions = int(layout.position.max()) + 1
    place = layout.position / (n_positions - 1)
    logits = fixed.skew + fixed.token[token_id] + place[:, None, None] * fixed.trend
    logits = logits + rng.normal(0, world.sequence, (world.n_sequences, *shape))[layout.sequence]
    steps = rng.normal(0, world.drift, (world.n_sequences, n_positions, *shape))
    steps[:, 1:] *= np.sqrt(1 - world.persistence**2)
    logits += signal.lfilter([1.0], [1.0, -world.persistence], steps, axis=1)[layout.sequence, layout.position]
    logits += rng.normal(0, world.noise, (n_tokens, *shape))
    names, families = np.array([*NAMES, ""])[layout.label], np.array(list(LABELS))[layout.family[layout.sequence]]
    for plant in world.plants:
        logits[(names == plant.label) | (families == plant.label), world.spec.row(plant.layer), plant.expert] += plant.boost
    return logits


def _joined(words: np.ndarray, owner: np.ndarray, n_owners: int) -> list[str]:
    bounds = np.searchsorted(owner, np.arange(n_owners + 1))
    return ["".join(words[start:stop]) for start, stop in pairwise(bounds)]


def _sequences(world: World, seed: int, layout: _Layout, rng: np.random.Generator, words: np.ndarray) -> pd.DataFrame:
    n, families = world.n_sequences, tuple(LABELS)
    n_steps = np.bincount(layout.piece_sequence[layout.piece_step >= 0], minlength=n)
    odds = 1.1 - world.longer_is_harder * (n_steps - n_steps.mean())
    correct = rng.random(n) < 1 / (1 + np.exp(-odds))
    answer = rng.integers(0, 100, n).astype(str)
    prompt = layout.piece_segment[layout.piece] == PROMPT
    family = [families[code] for code in layout.family]
    table = pd.DataFrame(
        {
            "sequence_id": [f"{name}-{seed}-{number:04d}" for number, name in enumerate(family)],
            "benchmark": "synthetic", "family": family, "split": "test",
            "prompt": _joined(words[prompt], layout.sequence[prompt], n),
            "completion": _joined(words[~prompt], layout.sequence[~prompt], n),
            "answer": answer, "predicted": np.where(correct, answer, "?"), "correct": correct,
            "meta": [json.dumps({"number": number, "difficulty": int(count)}) for number, count in enumerate(n_steps)],
        }
    )  # fmt: skip
    return table.astype({"correct": "boolean"})


def _steps(layout: _Layout, rng: np.random.Generator, words: np.ndarray) -> pd.DataFrame:
    is_step, texts = layout.piece_step >= 0, _joined(words, layout.piece, len(layout.length))
    start = layout.position[np.searchsorted(layout.piece, np.flatnonzero(is_step))]
    table = pd.DataFrame(
        {
            "sequence": layout.piece_sequence[is_step].astype(np.int32),
            "step": layout.piece_step[is_step].astype(np.int32),
            "label": np.array(NAMES, dtype=object)[layout.piece_label[is_step]],
            "text": [text for text, step in zip(texts, is_step, strict=True) if step],
            "start": start.astype(np.int32), "stop": (start + layout.length[is_step]).astype(np.int32),
            "correct": rng.random(is_step.sum()) < 0.9,
        }
    )  # fmt: skip
    return table.astype({"correct": "boolean"})
