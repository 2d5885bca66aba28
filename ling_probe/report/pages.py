"""What a report says, as a page, as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ling_probe.analysis import ANALYSES, SINGLE
from ling_probe.analysis.question import fold
from ling_probe.report import figures
from ling_probe.report.sections import Section
from ling_probe.run import Manifest, Run
from ling_probe.shown import all_shown, pages

LIMITS = (
    "The experts named first were picked on one half of the problems and measured on the other; other effects in the tables "
    "were picked and measured on the same problems, and will tend to be smaller on new ones.",
    "A preference is not a cause. Whether the model needs an expert for a kind of step shows once it is excluded or silenced.",
    "Tokens that occur under one label alone cannot tell meaning from wording; they count as wording.",
    "Steps are found and labelled by rule. Another way to cut the text can give other labels and other effects.",
    "Steps are compared in the same third of a solution; inside it place and length may still differ, and routing with them.",
    "Intervals speak of other problems like these, not of other benchmarks or other models.",
    "Expert numbers mean nothing across layers: expert 3 of one layer and of the next are unrelated.",
    "Texts the model did not write itself (given solutions) are routed as read, which need not be as written.",
)
BETWEEN = (
    "Expert numbers compare only between checkpoints of one training, or a model and one tuned from it.",
    "Tokens compare one by one only where both runs read the same text; texts that two models wrote are not the same.",
    "Runs that differ in several things (weights, prompts, number type, engine) do not tell which one made a difference.",
    "Intervals speak of other problems like these, not of other benchmarks or other models.",
)
"""The same of a comparison."""
PARTS = 20
"""Parts of a run that its manifest lists on the page; run.json lists all."""


def write_pages(folder: Path, told: Mapping[str, Any], sections: Sequence[Section], runs: Sequence[Run]) -> None:
    """Write report.html, report.md and report.json.

    Args:
        folder: Where to.
        told: What report.json is to hold.
        sections: Whose figures the page shows.
        runs: Whose manifests it holds.
    """
    told = all_shown(told)
    found = pages()
    found.filters["fold"] = fold
    found.globals["config"] = figures.CONFIG
    (folder / "report.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    script = found.get_template("report.js").render()
    values = dict(told) | {
        "title": _title(told),
        "manifests": [json.dumps(_short(run.manifest), indent=2, ensure_ascii=False) for run in runs],
        "figures": {each.analysis.name: list(figures.drawn(each)) for each in sections},
        "others": len(SINGLE) - len([each for each in told["index"] if each["analysis"] in SINGLE]),
        "compares": {name: each.compares for name, each in ANALYSES.items()},
        "script": Markup(script),
        "digests": f"'{figures.script_digest(script)}' '{figures.library_digest()}'",
        "library": figures.packed_library(),
    }
    for name in ("report.html", "report.md"):
        (folder / name).write_text(found.get_template(f"{name}.j2").render(values), encoding="utf-8")


def _title(told: Mapping[str, Any]) -> str:
    if told["comparison"]:
        first, *others = (run["name"] for run in told["comparison"]["runs"])
        return f"Routing of {first} against {', '.join(others)}"
    return f"Routing of {told['headline']['model']} on {told['headline']['benchmark'] or 'unnamed text'}"


def _short(manifest: Manifest) -> dict[str, Any]:
    values = manifest.to_dict()
    n_parts = len(values["parts"])
    kept = values["parts"][:PARTS] + ([f"and {n_parts - PARTS} more, in run.json"] if n_parts > PARTS else [])
    return all_shown(values | {"parts": kept})
