"""What a page of the explorer shows, read from Streamlit's own test harness."""

import base64
import json
import re
from html import unescape

import numpy as np


def page_text(app) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", each.proto.body)) for each in app.get("html"))


def error(app) -> str:
    """The one error shown, without the escapes of Markdown."""
    assert not app.exception
    (found,) = app.error
    return re.sub(r"\\(.)", r"\1", found.value)


def strip(app) -> dict:
    return json.loads(app.get("bidi_component")[0].proto.json)


def chart(app, number=0) -> dict:
    return json.loads(app.get("plotly_chart")[number].proto.spec)["data"]


def values(array) -> np.ndarray:
    """An array of a figure's JSON."""
    if isinstance(array, list):
        return np.array(array, float)
    shape = [int(length) for length in str(array.get("shape", "-1")).split(",")]
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).reshape(shape)


def press(app, label):
    return next(button for button in app.button if button.label == label).click().run()


def choose(app, label, value):
    return next(box for box in app.selectbox if box.label == label).set_value(value).run()
