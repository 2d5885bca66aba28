"""What to change about routing, as plain recordable values; carrying it out on a model is `capture`'s and `causal`'s.

With c the choice scores of one layer and one position, in this order:

    bias      c of the experts is raised by `value`
    exclude   c of the experts becomes -inf, before groups are scored: the next best step in
    (choose)  the usual rule: groups, then the K best, weights from the unbiased scores
    force     experts not among the K take the last slots, in ascending id; the lowest-ranked of the others leave, groups are
              not chosen again, and weights are the unbiased scores of the new K, divided by their sum, times the scale
    silence   nothing about the choice: the expert keeps slot and weight, and its output is not added

`route_with` is this in NumPy, the yardstick for a model's hooks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any, Literal, Self, get_args

import numpy as np
from jaxtyping import Bool, Float

from ling_probe.errors import InterventionError
from ling_probe.routing import Routing, choice_scores, choose, chosen_weights, scores
from ling_probe.spec import ModelSpec
from ling_probe.trace import SEGMENTS

Kind = Literal["exclude", "silence", "force", "bias"]
SCOPES = ("segments", "labels", "positions")
"""Fields that narrow where an intervention acts."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One change to one layer's routing; `exclude`, `silence`, `force` and `bias` make them.

    Each scope is None for everywhere; several must all hold. The order in which experts and scopes are given is not kept.

    Raises:
        InterventionError: An unknown kind or segment, no experts, or a value where none belongs.
    """

    kind: Kind
    layer: int
    """Decoder layer, dense ones counted."""
    experts: tuple[int, ...]
    """Ascending, without repeats."""
    value: float = 0.0
    """What `bias` adds to the choice score; 0 for every other kind."""
    segments: tuple[str, ...] | None = None
    """Names of `SEGMENTS`."""
    labels: tuple[str, ...] | None = None
    """Labels of reasoning steps."""
    positions: tuple[int, ...] | None = None
    """0-based positions in each sequence."""

    def __post_init__(self) -> None:
        for name in ("experts", "positions"):
            if (numbers := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(sorted({int(number) for number in numbers})))
        for name in ("segments", "labels"):
            if (words := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(sorted(set(words))))
        _check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, scopes of None left out; `from_dict` reads them back."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The intervention that `to_dict` wrote.

        Raises:
            InterventionError: A field is missing or unknown.
        """
        known, found = {field.name for field in fields(cls)}, set(values)
        if (missing := {"kind", "layer", "experts"} - found) or found - known:
            wrong = f"lacks {_listed(missing)}" if missing else f"has unknown {_listed(found - known)}"
            raise InterventionError(f"an intervention {wrong}; its fields are {_listed(known)}")
        return cls(**values)

    def covers(
        self,
        positions: np.ndarray,
        *,
        segments: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> Bool[np.ndarray, "T"]:
        """Which of these positions the intervention acts on.

        Args:
            positions: Of each token in its sequence.
            segments: Name of each token's segment.
            labels: Label of each token's reasoning step, "" in none.

        Raises:
            InterventionError: A scope asks for what is not given.
        """
        given = {"positions": positions, "segments": segments, "labels": labels}
        covered = np.ones(len(positions), bool)
        for scope in SCOPES:
            if (wanted := getattr(self, scope)) is not None:
                if (values := given[scope]) is None:
                    raise InterventionError(
                        f"{self.kind} at layer {self.layer} acts on some {scope} only, and none are known here"
                    )
                covered &= np.isin(np.asarray(values), wanted)
        return covered


def exclude(layer: int, experts: Iterable[int], **scope: Iterable[Any] | None) -> Intervention:
    """The experts cannot be chosen; the next best step in. Scopes: `segments`, `labels`, `positions`."""
    return Intervention(kind="exclude", layer=layer, experts=tuple(experts), **_scopes(scope))


def silence(layer: int, experts: Iterable[int], **scope: Iterable[Any] | None) -> Intervention:
    """The experts stay chosen and add nothing; nobody steps in. Scopes as for `exclude`."""
    return Intervention(kind="silence", layer=layer, experts=tuple(experts), **_scopes(scope))


def force(layer: int, experts: Iterable[int], **scope: Iterable[Any] | None) -> Intervention:
    """The experts take the place of the lowest-ranked chosen ones, unless chosen already. Scopes as for `exclude`."""
    return Intervention(kind="force", layer=layer, experts=tuple(experts), **_scopes(scope))


def bias(layer: int, experts: Iterable[int], value: float, **scope: Iterable[Any] | None) -> Intervention:
    """The experts' choice scores are raised by `value` (lowered if negative). Scopes as for `exclude`."""
    return Intervention(kind="bias", layer=layer, experts=tuple(experts), value=float(value), **_scopes(scope))


def check(intervention: Intervention, spec: ModelSpec) -> None:
    """Refuse what this model cannot carry out.

    Raises:
        InterventionError: The layer has no router, an expert does not exist, more than K are forced, or fewer than K might be
            left to choose from.
    """
    if intervention.layer not in spec.routed_layers:
        layers = ", ".join(map(str, spec.routed_layers)) or "none"
        raise InterventionError(f"layer {intervention.layer} of {spec.name} has no router; these do: {layers}")
    if wrong := [expert for expert in intervention.experts if not 0 <= expert < spec.n_experts]:
        raise InterventionError(f"expert {wrong[0]} does not exist in {spec.name}; its experts are 0-{spec.n_experts - 1}")
    if intervention.kind == "exclude":
        _check_room(intervention.experts, intervention.layer, spec)
    if intervention.kind == "force":
        _check_forced(intervention.experts, intervention.layer, spec)


def check_all(interventions: Sequence[Intervention], spec: ModelSpec) -> None:
    """Check each one, and together those that may act on the same layer and position.

    Raises:
        InterventionError: As for `check`, or an expert is both excluded and forced.
    """
    for intervention in interventions:
        check(intervention, spec)
    # A bias or a silenced expert meets no limit, and a steering vector is thousands of biases.
    limited = [each for each in interventions if each.kind in ("exclude", "force")]
    for intervention in limited:
        near = [other for other in limited if _may_meet(intervention, other)]
        _check_room(_experts("exclude", near), intervention.layer, spec)
        _check_forced(_experts("force", near), intervention.layer, spec)
    for one, other in combinations(limited, 2):
        shared = set(one.experts) & set(other.experts)
        if {one.kind, other.kind} == {"exclude", "force"} and shared and _may_meet(one, other):
            raise InterventionError(f"expert {min(shared)} of layer {one.layer} is both excluded and forced; keep one of them")


def route_with(
    interventions: Sequence[Intervention],
    logits: Float[np.ndarray, "T E"],
    bias: Float[np.ndarray, "E"],
    spec: ModelSpec,
    *,
    layer: int,
    segments: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Routing:
    """The rule of `routing.route` on one layer of one sequence, with the interventions on that layer carried out."""
    score = scores(logits.astype(np.float64))
    choice = choice_scores(score, bias)
    cells = {kind: np.zeros(choice.shape, bool) for kind in get_args(Kind)}
    for each in (each for each in interventions if each.layer == layer):
        covered = each.covers(np.arange(len(logits)), segments=segments, labels=labels)
        cell = np.outer(covered, np.isin(np.arange(spec.n_experts), each.experts))
        choice[cell] += each.value
        cells[each.kind] |= cell
    choice[cells["exclude"]] = -np.inf
    ids, forced = choose(choice, spec), cells["force"]
    for position in np.flatnonzero(forced.any(axis=-1)):
        ids[position] = _with_forced(ids[position], np.flatnonzero(forced[position]))
    return Routing(ids=ids, weights=chosen_weights(score, ids, spec))


def _with_forced(ids: np.ndarray, forced: np.ndarray) -> np.ndarray:
    """One choice with the forced experts in it."""
    missing = np.setdiff1d(forced, ids)
    free = np.flatnonzero(~np.isin(ids, forced))
    leaving = free[len(free) - len(missing) :]
    return np.concatenate([np.delete(ids, leaving), missing.astype(ids.dtype)])


def _check_values(intervention: Intervention) -> None:
    kind, where = intervention.kind, f"{intervention.kind} at layer {intervention.layer}"
    if kind not in get_args(Kind):
        raise InterventionError(f"no intervention is called {kind!r}; there are {', '.join(get_args(Kind))}")
    if any(getattr(intervention, name) == () for name in ("experts", *SCOPES)):
        raise InterventionError(f"{where} has an empty list of experts or scope; name at least one, or leave the scope out")
    if (intervention.value != 0) != (kind == "bias") or not np.isfinite(intervention.value):
        expected = "a finite value other than 0" if kind == "bias" else "no value; only bias has one"
        raise InterventionError(f"{where} has value {intervention.value}; expected {expected}")
    if unknown := set(intervention.segments or ()) - set(SEGMENTS):
        raise InterventionError(f"{where} names segment {_listed(unknown)}; there are {', '.join(SEGMENTS)}")


def _check_room(excluded: Iterable[int], layer: int, spec: ModelSpec) -> None:
    """Whichever groups the router keeps must hold K experts; a group with one expert left is never kept before one with two."""
    left = np.full(spec.n_groups, spec.group_size)
    np.subtract.at(left, np.array(sorted(set(excluded)), np.int64) // spec.group_size, 1)
    kept = np.sort(left[left >= 2])[: spec.topk_groups] if spec.n_groups > 1 else left
    if kept.sum() < spec.top_k:
        raise InterventionError(
            f"excluding {len(set(excluded))} experts at layer {layer} of {spec.name} can leave {kept.sum()} to choose from "
            f"in the {spec.topk_groups} groups kept, and {spec.top_k} are chosen; exclude fewer"
        )


def _check_forced(forced: Iterable[int], layer: int, spec: ModelSpec) -> None:
    if (count := len(set(forced))) > spec.top_k:
        raise InterventionError(
            f"{count} experts are forced at layer {layer}, and {spec.name} chooses {spec.top_k}; force fewer"
        )


def _may_meet(one: Intervention, other: Intervention) -> bool:
    """Whether both can act on one position of one layer, as far as their scopes tell."""
    scopes = [(getattr(one, name), getattr(other, name)) for name in SCOPES]
    return one.layer == other.layer and all(a is None or b is None or set(a) & set(b) for a, b in scopes)


def _experts(kind: Kind, interventions: Iterable[Intervention]) -> set[int]:
    return {expert for each in interventions if each.kind == kind for expert in each.experts}


def _scopes(scope: Mapping[str, Iterable[Any] | None]) -> dict[str, Any]:
    if unknown := set(scope) - set(SCOPES):
        raise InterventionError(f"no scope is called {_listed(unknown)}; there are {', '.join(SCOPES)}")
    return {name: tuple(values) for name, values in scope.items() if values is not None}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
