"""Figures as data for a page that draws them itself, and the library that does, packed."""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from ling_probe import charts
from ling_probe.report.sections import Section
from ling_probe.shown import shown

CONFIG = Markup(json.dumps(charts.EXPORT_CONFIG))
LABEL = 1_000
"""Letters of a text in a figure that are kept."""


def drawn(section: Section) -> Iterator[dict[str, Any]]:
    """A section's figures: id, height in pixels, caption, and the data as text for a script element."""
    for place, figure in enumerate(section.figures):
        # The page says the question already.
        plain = go.Figure(figure).update_layout(title_text="", margin_t=30)
        yield {
            "id": f"{section.analysis.name}-{place}",
            "height": int(figure.layout.height or 450),
            "title": shown(unescape(figure.layout.title.text or "")),
            "data": _script_text(plain),
        }


def _script_text(figure: go.Figure) -> Markup:
    """JSON in which nothing ends the script element that holds it."""
    text = json.dumps(_short(figure.to_dict()), cls=PlotlyJSONEncoder, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _short(value: Any) -> Any:
    """A figure whose texts are fit to show; its packed numbers are texts too, and stay whole."""
    if isinstance(value, dict):
        return value if "bdata" in value else {name: _short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _short(value.tolist())
    return shown(value, most=LABEL) if isinstance(value, str) else value


@cache
def packed_library() -> Markup:
    """Plotly's script, compressed: a third of its size on the page."""
    return Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode())


@cache
def library_digest() -> str:
    """What a content security policy calls Plotly's script."""
    return script_digest(get_plotlyjs())


def script_digest(script: str) -> str:
    """What a content security policy calls a script: no other is run.

    >>> script_digest("")
    'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
