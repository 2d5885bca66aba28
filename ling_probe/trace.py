"""One sequence's routing, checked against its model's spec.

The router's own choice is what is recorded: ids in its slot order and the weights it gave them (a silenced expert keeps its
weight here). Nothing in this file derives a choice from logits; `routing` does, and only to compare.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int32, UInt8, UInt16

from ling_probe.errors import RoutingMismatch, UsageError
from ling_probe.spec import ModelSpec

SEGMENTS = ("prompt", "reasoning", "answer", "special", "template")
"""Names of the segment codes 0..4; ``template`` is what a chat template adds around the prompt."""

NORMS = ("contribution", "shared", "residual")
"""Extras that are norms: finite, and none below 0."""
EVERY_LAYER = ("residual",)
"""Extras that dense layers have too."""

WEIGHT_TOLERANCE = 1e-2
"""How far the weights of a choice may sum from the scale, as a share of it: what rounding to 16 bits needs."""


@dataclass(frozen=True, kw_only=True)
class StepSpan:
    """One reasoning step of a sequence and the tokens it covers."""

    step: int
    """0-based place among the sequence's steps."""
    label: str
    text: str
    start: int
    """First position of the step."""
    stop: int
    """One past its last position; equal to `start` where no token begins inside the step."""
    correct: bool | None = None
    """None where nothing could judge the step."""


@dataclass(frozen=True, eq=False)
class Activation:
    """The vectors of one place of the model for one sequence; they may lie on a disk until they are read."""

    positions: Int32[np.ndarray, "_N"]
    """Of the tokens, ascending."""
    stored: Callable[[], np.ndarray]
    """Reads the vectors [N D] as the model computed them: float32, float16, or uint16 for the bits of bfloat16."""

    @property
    def vectors(self) -> Float32[np.ndarray, "_N _D"]:
        """The vectors, read anew each time."""
        return as_float32(self.stored())


def as_float32(stored: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Stored numbers as float32; unsigned ones are the bits of bfloat16.

    >>> as_float32(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Which experts one sequence used, per token and routed layer.

    Raises:
        UsageError: Sizes, types, segments or steps do not fit each other or the spec.
        RoutingMismatch: The recorded choice is none that the spec's router could make.
    """

    spec: ModelSpec
    sequence_id: str
    token_ids: Int32[np.ndarray, "_T"]
    tokens: tuple[str, ...]
    """[T] the exact text of each token."""
    expert_ids: UInt8[np.ndarray, "_T _M _K"] | UInt16[np.ndarray, "_T _M _K"]
    """Slots in the router's order, best choice score first."""
    weights: Float32[np.ndarray, "_T _M _K"]
    """Aligned with `expert_ids`; each K sum to the scale."""
    segment: UInt8[np.ndarray, "_T"]
    """Codes of `SEGMENTS`."""
    step: Int16[np.ndarray, "_T"]
    """Place in `steps`, -1 in no step."""
    loss: Float32[np.ndarray, "_T"]
    """[T] -log p of token t+1 seen from position t, nats; NaN at the last position."""
    steps: tuple[StepSpan, ...] = ()
    """In order, not overlapping."""
    benchmark: str = ""
    family: str = ""
    split: str = ""
    prompt: str = ""
    completion: str = ""
    answer: str = ""
    """What the benchmark expects."""
    predicted: str = ""
    correct: bool | None = None
    """None where there is no answer to compare with."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, floats [T M] or [T M n], and [T L] for "residual", which every decoder layer has:

        logits        [T M E]  router logits
        contribution  [T M K]  norm of weight times output of each chosen expert; 0 for a silenced one
        shared        [T M]    norm of the shared expert's output
        residual      [T L]    norm of the residual stream after the layer
        lens          [T M K]  logit of the next token that each chosen expert's contribution adds directly; NaN at the end
        lens_shared   [T M]    the same of the shared expert
    """
    activations: Mapping[str, Activation] = field(default_factory=dict)
    """Vectors by site, named as in `ActivationSpec`."""
    group_limited: bool = True
    """False where an intervention may have put experts outside the router's kept groups (`force`)."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_extras(self)
        _check_activations(self)
        _check_steps(self)
        _check_choice(self)
        _check_weights(self)

    @property
    def n_tokens(self) -> int:
        """Length of the T axis."""
        return len(self.token_ids)


def _check_sizes(trace: RoutingTrace) -> None:
    n_tokens, choice = len(trace.tokens), (len(trace.tokens), trace.spec.n_rows, trace.spec.top_k)
    if not n_tokens:
        raise UsageError(f"sequence {trace.sequence_id} has no tokens; a trace needs one at least")
    expected: dict[str, tuple[tuple[int, ...], tuple[type[np.generic], ...]]] = {
        "token_ids": ((n_tokens,), (np.int32,)),
        "expert_ids": (choice, (np.uint8, np.uint16)),
        "weights": (choice, (np.float32,)),
        "segment": ((n_tokens,), (np.uint8,)),
        "step": ((n_tokens,), (np.int16,)),
        "loss": ((n_tokens,), (np.float32,)),
    }
    for name, (shape, types) in expected.items():
        array: np.ndarray = getattr(trace, name)
        if array.shape != shape or array.dtype not in types:
            wanted = f"{'|'.join(t.__name__ for t in types)} {list(shape)}"
            found = f"{array.dtype} {list(array.shape)}"
            raise UsageError(
                f"{name} of sequence {trace.sequence_id} is {found}; {n_tokens} tokens of {trace.spec.name} need {wanted}"
            )
    if trace.segment.max() >= len(SEGMENTS):
        codes = ", ".join(f"{code} {name}" for code, name in enumerate(SEGMENTS))
        raise UsageError(f"sequence {trace.sequence_id} has segment code {trace.segment.max()}; the codes are {codes}")


def extra_layers(name: str, spec: ModelSpec) -> tuple[int, ...]:
    """Decoder layers that an extra has a column for: all for `EVERY_LAYER`, else the routed ones."""
    return tuple(range(spec.n_layers)) if name in EVERY_LAYER else spec.routed_layers


def _check_extras(trace: RoutingTrace) -> None:
    n_tokens, spec = trace.n_tokens, trace.spec
    last: dict[str, tuple[int, ...]] = {"logits": (spec.n_experts,), "contribution": (spec.top_k,), "lens": (spec.top_k,)}
    last |= dict.fromkeys(("shared", "residual", "lens_shared"), ())
    for name, array in trace.extras.items():
        if name in ("experts", "weights") or not name.isidentifier():
            raise UsageError(f"extra {name!r} of sequence {trace.sequence_id} cannot name a column; use another word")
        leading = (n_tokens, len(extra_layers(name, spec)))
        fits = array.shape == (*leading, *last[name]) if name in last else array.ndim in (2, 3) and array.shape[:2] == leading
        if not fits or array.dtype.kind != "f":
            wanted = f"floats {[*leading, *last[name]]}" if name in last else f"floats {list(leading)} or {[*leading, 'n']}"
            raise UsageError(
                f"extra {name!r} of sequence {trace.sequence_id} is {array.dtype} {list(array.shape)}; expected {wanted}"
            )
        if name in NORMS:
            _check_norms(trace, name, array)


def _check_activations(trace: RoutingTrace) -> None:
    for name, activation in trace.activations.items():
        edges = np.concatenate([[-1], activation.positions, [trace.n_tokens]])
        if (np.diff(edges) <= 0).any():
            raise UsageError(
                f"activation {name} of sequence {trace.sequence_id} has positions {activation.positions.tolist()}; "
                f"expected ascending ones below {trace.n_tokens}"
            )


def _check_norms(trace: RoutingTrace, name: str, array: np.ndarray) -> None:
    wrong = ~(np.isfinite(array) & (array >= 0)).reshape(*array.shape[:2], -1).all(axis=-1)
    if (place := _first(wrong)) is not None:
        position, layer = place[0], extra_layers(name, trace.spec)[place[1]]
        raise UsageError(
            f"extra {name!r} of sequence {trace.sequence_id}, layer {layer}, position {position} is {array[place]}; "
            "a norm is finite and not below 0"
        )


def _check_steps(trace: RoutingTrace) -> None:
    expected, reached = np.full(trace.n_tokens, -1, np.int16), 0
    for place, span in enumerate(trace.steps):
        if span.step != place or not reached <= span.start <= span.stop <= trace.n_tokens:
            raise UsageError(
                f"step {span.step} ({span.label}) of sequence {trace.sequence_id} covers positions {span.start}-{span.stop}; "
                f"expected step {place}, inside {reached}-{trace.n_tokens}: steps are numbered in order and do not overlap"
            )
        expected[span.start : span.stop] = place
        reached = span.stop
    if (wrong := np.flatnonzero(trace.step != expected)).size:
        position = int(wrong[0])
        raise UsageError(
            f"position {position} of sequence {trace.sequence_id} is marked step {trace.step[position]}; "
            f"the spans of its {len(trace.steps)} steps put it in {expected[position]} (-1 is no step)"
        )


def _check_choice(trace: RoutingTrace) -> None:
    spec, ids = trace.spec, np.sort(trace.expert_ids, axis=-1)
    if (place := _first(ids[..., -1] >= spec.n_experts)) is not None:
        raise RoutingMismatch(f"{_where(trace, place)}: expert {ids[place][-1]} does not exist; there are {spec.n_experts}")
    if (place := _first((ids[..., 1:] == ids[..., :-1]).any(axis=-1))) is not None:
        chosen = trace.expert_ids[place].tolist()
        raise RoutingMismatch(
            f"{_where(trace, place)}: an expert is chosen twice in {chosen}; a router picks {spec.top_k} different"
        )
    groups = ids // np.int32(spec.group_size)  # 256 is no uint8
    n_groups = 1 + (groups[..., 1:] != groups[..., :-1]).sum(axis=-1)
    if trace.group_limited and (place := _first(n_groups > spec.topk_groups)) is not None:
        raise RoutingMismatch(
            f"{_where(trace, place)}: experts {trace.expert_ids[place].tolist()} lie in {n_groups[place]} groups; "
            f"{spec.name} chooses from {spec.topk_groups} of {spec.n_groups}"
        )


def _check_weights(trace: RoutingTrace) -> None:
    scale = trace.spec.scale
    near = np.abs(trace.weights.sum(axis=-1, dtype=np.float64) - scale) <= WEIGHT_TOLERANCE * scale
    if (place := _first(~(near & (trace.weights >= 0).all(axis=-1)))) is not None:
        found = np.round(trace.weights[place].astype(float), 4).tolist()
        raise RoutingMismatch(f"{_where(trace, place)}: weights {found} are not {len(found)} shares that sum to {scale:g}")


def _first(bad: Bool[np.ndarray, "_T _M"]) -> tuple[int, int] | None:
    """Position and row of the first True."""
    if not bad.any():
        return None
    position, row = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(position), int(row)


def _where(trace: RoutingTrace, place: tuple[int, int]) -> str:
    position, row = place
    return f"sequence {trace.sequence_id}, layer {trace.spec.routed_layers[row]}, position {position}"
