"""One problem of a run, token by token: the tables behind the explorer's token page, and the chart of one token.

Only the part that holds the problem is opened, and of it only the rows and columns asked for. Texts come out as they were
recorded; whoever shows them escapes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from jaxtyping import Float16, Float64, UInt8, UInt16

from ling_probe import charts, metrics, routing
from ling_probe.analysis.comparable import require_comparable
from ling_probe.analysis.router import router_bias
from ling_probe.errors import RunError, UsageError
from ling_probe.run import Run
from ling_probe.run.one import find_sequence, lists, part_file, sequence_rows
from ling_probe.run.tables import read_table

TOKEN_VIEW_COLUMNS = ("position", "token", "segment", "step", "label", "step_correct", "loss")
"""Columns of `token_table` that do not depend on the layer."""

LONGEST = 200
"""Characters of a token that are shown."""
_GLYPHS = {" ": "·", "\n": "⏎", "\t": "⇥"}


def problem_table(run: Run) -> pd.DataFrame:
    """One row a sequence, in the order of `Run.sequences`: sequence_id, family, correct; no long texts are read."""
    names = ["sequence_id", "family", "correct"]
    tables = [read_table(part_file(run, part.name, "sequences"), names) for part in run.manifest.parts]
    table = pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame(columns=names)
    return table.astype({"correct": "boolean"})


def problem_facts(run: Run, sequence: int) -> dict[str, Any]:
    """The row of sequences.parquet of one sequence, by column; `correct` is True, False or None.

    Args:
        run: The run.
        sequence: Row in `Run.sequences`.

    Raises:
        UsageError: There is no such row.
        RunError: A file is damaged.
    """
    part, sequence_id = find_sequence(run, sequence)
    return sequence_rows(part_file(run, part, "sequences"), sequence_id).to_pylist()[0]


def token_table(run: Run, sequence: int, *, layer: int) -> pd.DataFrame:
    """One row a token of one sequence, with what one layer chose for it.

    `position`, `token`, `segment`, `step` (-1 in none) with its `label` and `step_correct`, `loss` (nats, next token, NaN at
    the last); `expert` leads, which is to have the largest `weight`, not slot 0; `experts` and `weights` hold the K chosen as
    tuples, largest weight first, and `contributions` the norms of what they added, None where the run did not keep them.

    Args:
        run: The run.
        sequence: Row in `Run.sequences`.
        layer: A decoder layer.

    Raises:
        UsageError: There is no such row, or the layer has no router.
        RunError: A file is damaged.
    """
    run.spec.row(layer)
    part, sequence_id = find_sequence(run, sequence)
    chosen = [f"{kind}_{layer}" for kind in ("experts", "weights", *(["contribution"] if "contribution" in _kept(run) else []))]
    rows = sequence_rows(part_file(run, part, "tokens"), sequence_id, ["position", "token", "segment", "step", "loss", *chosen])
    if not rows.num_rows:
        raise RunError(f"{part_file(run, part, 'tokens')} has no tokens of {sequence_id}; it is damaged: copy the run again")
    table = rows.drop_columns(chosen).to_pandas().astype({"segment": str})
    steps = (
        sequence_rows(part_file(run, part, "steps"), sequence_id, ["step", "label", "correct"])
        .to_pandas()
        .astype({"correct": "boolean"})
    )
    table = table.merge(steps.rename(columns={"correct": "step_correct"}), on="step", how="left").fillna({"label": ""})
    experts, weights, slots = _by_weight(lists(rows[chosen[0]]), lists(rows[chosen[1]]))
    table = table[list(TOKEN_VIEW_COLUMNS)].assign(expert=experts[:, 0], weight=weights[:, 0])
    table["experts"] = list(map(tuple, experts.tolist()))
    table["weights"] = list(map(tuple, weights.tolist()))
    added = [np.take_along_axis(lists(rows[name]), slots, -1).astype(np.float32).tolist() for name in chosen[2:]]
    table["contributions"] = list(map(tuple, added[0])) if added else None
    return table


@dataclass(frozen=True, eq=False)
class Scale:
    """A number for each token of a sequence, and the range to colour it in."""

    name: str
    """Of the number, with its unit."""
    values: Float64[np.ndarray, "_T"]
    """NaN where a token has none."""
    low: float
    high: float

    @property
    def levels(self) -> Float64[np.ndarray, "_T"]:
        """Values as shares of the range, from 0 to 1."""
        return np.clip((self.values - self.low) / max(self.high - self.low, np.finfo(float).tiny), 0, 1)


def colourings(run: Run, *, compared: bool) -> tuple[str, ...]:
    """What tokens can be coloured by: "expert", or a `token_scale`.

    Args:
        run: The run.
        compared: Whether there is another run to agree with.
    """
    margin = ("margin",) if "logits" in _kept(run) else ()
    return ("expert", "entropy", *margin, "loss", *(("agreement",) if compared else ()))


def token_scale(run: Run, sequence: int, *, layer: int, by: str, against: Run | None = None) -> Scale:
    """A measure of the routing of each token of a sequence in one layer.

        entropy     of the router's normalised scores over its maximum; of the chosen weights where no logits were kept
        margin      choice score of the least chosen expert over the best not chosen in the kept groups
        loss        of the next token, in nats
        agreement   share of the K experts that the other run chose too, up to the first token that it does not have

    Args:
        run: The run.
        sequence: Row in `Run.sequences`.
        layer: A decoder layer.
        by: One of `colourings`, "expert" aside.
        against: The other run of an agreement.

    Raises:
        UsageError: There is no such row or measure, the layer has no router, or the other run cannot be compared.
        RunError: A file is damaged.
    """
    run.spec.row(layer)
    if by == "agreement" and against is not None:
        return _agreement(run, against, sequence, layer)
    part, sequence_id = find_sequence(run, sequence)
    logits, column = f"logits_{layer}", {"loss": "loss", "entropy": f"weights_{layer}"}.get(by)
    if by in ("entropy", "margin") and "logits" in _kept(run):
        column = logits
    if column is None:
        raise UsageError(f'tokens of this run have no "{by}"; colour by one of {", ".join(colourings(run, compared=False))}')
    stored = sequence_rows(part_file(run, part, "tokens"), sequence_id, [column])[column]
    if by == "loss":
        values = stored.to_numpy().astype(np.float64)
        return Scale("loss of the next token, in nats", values, 0.0, float(np.nanmax(values, initial=0.0)))
    numbers = lists(stored).astype(np.float64)
    if by == "margin":
        values = routing.margin(routing.choice_scores(routing.scores(numbers), router_bias(run)[layer]), run.spec)
        finite = np.where(np.isfinite(values), values, np.nan)
        return Scale("margin of the choice, in units of score", finite, 0.0, float(np.nanmax(finite, initial=0.0)))
    of = "the router's scores" if column == logits else "the chosen weights"
    shares = routing.scores(numbers) if column == logits else numbers
    values = metrics.load_entropy(shares)
    return Scale(f"entropy of {of}, of its maximum", values, float(values.min()), float(values.max()))


def _agreement(run: Run, against: Run, sequence: int, layer: int) -> Scale:
    require_comparable([run, against])
    part, sequence_id = find_sequence(run, sequence)
    there = problem_table(against)["sequence_id"].eq(sequence_id).to_numpy()
    if not there.any():
        raise UsageError(f"{against.folder.name} has no problem {sequence_id}; compare with a run of the same benchmark")
    other_part, _ = find_sequence(against, int(there.argmax()))
    names = ["token_id", f"experts_{layer}"]
    ours, theirs = (
        sequence_rows(part_file(each, place, "tokens"), sequence_id, names)
        for each, place in ((run, part), (against, other_part))
    )
    length = min(ours.num_rows, theirs.num_rows)
    same = np.asarray(ours["token_id"])[:length] == np.asarray(theirs["token_id"])[:length]
    shared = length if same.all() else int(same.argmin())
    common = metrics.overlap(lists(ours[names[1]])[:shared], lists(theirs[names[1]])[:shared])
    values = np.full(ours.num_rows, np.nan)
    values[:shared] = common / run.spec.top_k
    return Scale(f"share of the {run.spec.top_k} experts that {against.folder.name} chose too", values, 0.0, 1.0)


def _kept(run: Run) -> tuple[str, ...]:
    return run.manifest.parts[0].extras if run.manifest.parts else ()


@dataclass(frozen=True, eq=False)
class Choices:
    """What every layer chose for every token of one sequence."""

    layers: tuple[int, ...]
    expert_ids: UInt8[np.ndarray, "_T _M _K"] | UInt16[np.ndarray, "_T _M _K"]
    """In the router's order."""
    weights: Float16[np.ndarray, "_T _M _K"]


def sequence_choices(run: Run, sequence: int) -> Choices:
    """Read what all layers chose in one sequence.

    Raises:
        UsageError: There is no such row.
        RunError: A file is damaged.
    """
    part, sequence_id = find_sequence(run, sequence)
    layers = run.spec.routed_layers
    names = [f"{kind}_{layer}" for kind in ("experts", "weights") for layer in layers]
    rows = sequence_rows(part_file(run, part, "tokens"), sequence_id, names)
    ids, weights = (np.stack([lists(rows[f"{kind}_{layer}"]) for layer in layers], 1) for kind in ("experts", "weights"))
    return Choices(layers, ids, weights)


def token_layers(choices: Choices, position: int) -> pd.DataFrame:
    """Every layer's choice for one token: layer, rank (0 leads), slot (the router's order), expert, weight.

    Raises:
        UsageError: There is no such position.
    """
    if not 0 <= position < len(choices.expert_ids):
        raise UsageError(f"this sequence has no position {position}; it has {len(choices.expert_ids)}, counted from 0")
    experts, weights, slots = _by_weight(choices.expert_ids[position], choices.weights[position])
    width = experts.shape[1]
    return pd.DataFrame(
        {
            "layer": np.repeat(choices.layers, width),
            "rank": np.tile(np.arange(width), len(choices.layers)),
            "slot": slots.ravel(),
            "expert": experts.ravel(),
            "weight": weights.ravel(),
        }
    )


def leading_experts(tokens: pd.DataFrame, *, colours: int = len(charts.PALETTE)) -> pd.DataFrame:
    """The experts that lead most tokens of a `token_table`, each with a colour of its own: expert, tokens, colour.

    `colour` counts from 0. An expert keeps the colour its number gives it (number modulo colours) unless an expert that leads
    more tokens has that one, so it looks alike from problem to problem where it can.
    """
    counts = tokens["expert"].value_counts().rename_axis("expert").rename("tokens").reset_index()
    counts = counts.sort_values(["tokens", "expert"], ascending=[False, True]).head(colours)
    taken: list[int] = []
    for expert in counts["expert"].tolist():
        nearest = ((expert + step) % colours for step in range(colours))
        taken.append(next(colour for colour in nearest if colour not in taken))
    return counts.assign(colour=taken).reset_index(drop=True)


def example_sequence(run: Run, label: str) -> int:
    """Row of the sequence with the most steps of a label, the first of several.

    Raises:
        UsageError: No step has the label.
    """
    steps = run.steps
    here = steps.loc[steps["label"] == label, "sequence"]
    if here.empty:
        raise UsageError(f'{run.folder} has no step labelled "{label}"')
    return int(here.mode().iloc[0])


def visible_text(text: str) -> str:
    """A token on one line: its `visible_pieces` joined.

    >>> visible_text(" the")
    '·the'
    """
    return "".join(piece for piece, _ in visible_pieces(text))


def visible_pieces(text: str) -> list[tuple[str, bool]]:
    r"""A token's text in pieces to show, True where a piece stands for what could not be seen.

    White space becomes a glyph, other characters without a shape (controls, marks that turn the reading direction) their code.
    What is longer than a word ever is, is cut with a note of how much more there is.

    >>> visible_pieces(" the\n")
    [('·', True), ('the', False), ('⏎', True)]
    >>> visible_pieces("a\u202eb")
    [('a', False), ('‹202E›', True), ('b', False)]
    >>> visible_pieces("a" * 1000)[-1]
    ('‹… and 800 more›', True)
    """
    more = [(f"‹… and {len(text) - LONGEST:,} more›", True)] if len(text) > LONGEST else []
    return [*_pieces(text[:LONGEST]), *more]


def layers_figure(table: pd.DataFrame) -> go.Figure:
    """Layers by rank of a `token_layers` table: the experts one token was sent to, coloured by their weight."""
    cells = {name: table.pivot(index="layer", columns="rank", values=name) for name in ("weight", "expert")}  # noqa: PD010
    heat = go.Heatmap(
        z=cells["weight"].to_numpy(np.float32),
        x=[f"{place}." for place in range(1, cells["weight"].shape[1] + 1)],
        y=[str(layer) for layer in cells["weight"].index],
        text=cells["expert"].to_numpy(),
        zmin=0,
        zmax=float(table["weight"].max()),
        colorscale="Viridis",
        colorbar={"title": "weight", "thickness": 12},
        texttemplate="<b>%{text}</b><br>%{z:.2f}",
        textfont={"size": 11},
        hovertemplate="layer %{y}, expert %{text}<br>weight %{z:.3f}<extra></extra>",
        xgap=2,
        ygap=2,
    )
    figure = go.Figure(heat).update_xaxes(title="chosen experts, largest weight first", side="top", type="category")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    return figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=110 + 36 * len(cells["weight"]),
        margin={"l": 50, "r": 10, "t": 60, "b": 10},
    )


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    for hidden, letters in groupby(text, key=lambda letter: letter == " " or not letter.isprintable()):
        if hidden:
            yield from ((_glyph(letter), True) for letter in letters)
        else:
            yield "".join(letters), False


def _glyph(letter: str) -> str:
    return _GLYPHS.get(letter, f"‹{ord(letter):04X}›")


def _by_weight(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, weights and slots of each row, largest weight first; equal weights keep the router's order."""
    slots = np.argsort(-weights.astype(np.float32), axis=-1, kind="stable")
    return np.take_along_axis(ids, slots, -1), np.take_along_axis(weights, slots, -1).astype(np.float32), slots
