"""Interventions carried out on the gates of a native model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from ling_probe.capture.layout import Layout
from ling_probe.errors import InterventionError
from ling_probe.interventions import SCOPES, Intervention
from ling_probe.model.load import LoadedLing
from ling_probe.model.modeling import LingGate
from ling_probe.trace import SEGMENTS


class Editor:
    """Carries out interventions through the gates' own hook points; without any it attaches nothing."""

    def __init__(self, loaded: LoadedLing, interventions: Sequence[Intervention]) -> None:
        self._gates = loaded.gates()
        self._interventions = tuple(interventions)
        self._cover: dict[Intervention, torch.Tensor] = {}
        """Tokens that an intervention acts on; one without a place here acts on all."""
        self._device = loaded.native.device

    @property
    def may_leave_groups(self) -> bool:
        """Whether a forced expert may lie outside the kept groups."""
        return any(each.kind == "force" for each in self._interventions)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Edit every token while the block runs.

        Raises:
            InterventionError: One is limited to segments, steps or positions, which are not known while a text grows.
        """
        for each in self._interventions:
            if _scoped(each):
                raise InterventionError(
                    f"{each.kind} at layer {each.layer} is limited to some tokens; while generating it must act on all"
                )
        self._cover = {}
        with self._attached():
            yield

    @contextmanager
    def inside(self, layouts: Sequence[Layout], width: int) -> Iterator[None]:
        """Edit the covered tokens of a right-padded batch while the block runs."""
        self._cover = {each: self._covered(each, layouts, width) for each in self._interventions if _scoped(each)}
        with self._attached():
            yield

    def _covered(self, intervention: Intervention, layouts: Sequence[Layout], width: int) -> torch.Tensor:
        cover = np.zeros((len(layouts), width), bool)
        for row, layout in enumerate(layouts):
            names = np.array(["", *(span.label for span in layout.steps)], dtype=object)
            cover[row, : len(layout.step)] = intervention.covers(
                np.arange(len(layout.step)),
                segments=[SEGMENTS[code] for code in layout.segment],
                labels=list(names[layout.step + 1]),
            )
        return torch.from_numpy(cover.reshape(-1)).to(self._device)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, gate in self._gates.items():
                mine = [each for each in self._interventions if each.layer == layer]
                for module, edit in self._edits(gate, mine):
                    stack.callback(module.register_forward_hook(edit).remove)
            yield

    def _edits(self, gate: LingGate, mine: list[Intervention]) -> Iterator[tuple[torch.nn.Module, Any]]:
        kinds = {each.kind for each in mine}
        if kinds & {"exclude", "bias"}:
            yield gate.choice, lambda _m, _a, choice: self._edit_choice(choice, mine)
        if "force" in kinds:
            yield gate.expert_ids, lambda _m, _a, ids: self._force(ids, mine)
        if "silence" in kinds:
            yield gate, lambda _m, _a, out: (out[0], self._silence(out[1], out[2], mine), out[2])

    def _cells(self, each: Intervention, tokens: int, n_experts: int) -> torch.Tensor:
        """Which (token, expert) cells an intervention touches [T, E]."""
        experts = torch.zeros(n_experts, dtype=torch.bool, device=self._device)
        experts[list(each.experts)] = True
        cover = self._cover.get(each)
        return experts.expand(tokens, n_experts) if cover is None else cover[:, None] & experts

    def _edit_choice(self, choice: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        everywhere = [each for each in mine if each.kind == "bias" and not _scoped(each)]
        edited = choice + self._bias_of(everywhere, choice) if everywhere else choice
        rest = [each for each in mine if each.kind == "bias" and _scoped(each)]
        for each in (*rest, *(each for each in mine if each.kind == "exclude")):
            cells = self._cells(each, *choice.shape)
            edited = torch.where(cells, float("-inf") if each.kind == "exclude" else edited + each.value, edited)
        return edited

    def _bias_of(self, everywhere: list[Intervention], choice: torch.Tensor) -> torch.Tensor:
        """What biases that act on every token add to each expert [E]; a steering vector is one for every expert."""
        values = np.zeros(choice.shape[1])
        for each in everywhere:
            values[list(each.experts)] += each.value
        return torch.from_numpy(values).to(choice)

    def _force(self, ids: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        """Forced experts not among the chosen take the last slots, in ascending id; the lowest-ranked others leave."""
        n_experts = next(iter(self._gates.values())).n_experts
        forced = torch.zeros(len(ids), n_experts, dtype=torch.bool, device=ids.device)
        for each in (each for each in mine if each.kind == "force"):
            forced |= self._cells(each, len(ids), n_experts)
        chosen = torch.zeros_like(forced).scatter_(1, ids, value=True)
        missing = forced & ~chosen
        k = ids.shape[1]
        # Stayers keep their order, first the forced ones' need of room is met from the back of the free slots.
        free = ~forced.gather(1, ids)
        room = missing.sum(1, keepdim=True)
        free_from_back = free.flip(1).cumsum(1).flip(1)
        leaving = free & (free_from_back <= room)
        stay_order = torch.where(leaving, k, torch.arange(k, device=ids.device).expand_as(ids)).argsort(dim=1, stable=True)
        stayed = ids.gather(1, stay_order)
        incoming = torch.where(missing, torch.arange(n_experts, device=ids.device), n_experts).sort(dim=1).values[:, :k]
        slot = torch.arange(k, device=ids.device).expand_as(ids)
        place = (slot - (k - room)).clamp(min=0)
        return torch.where(slot < k - room, stayed, incoming.gather(1, place))

    def _silence(self, weights: torch.Tensor, ids: torch.Tensor, mine: list[Intervention]) -> torch.Tensor:
        n_experts = next(iter(self._gates.values())).n_experts
        for each in (each for each in mine if each.kind == "silence"):
            weights = weights.masked_fill(self._cells(each, len(ids), n_experts).gather(1, ids), 0.0)
        return weights


def _scoped(intervention: Intervention) -> bool:
    """Whether it acts on some tokens only."""
    return any(getattr(intervention, name) is not None for name in SCOPES)
