"""Which arithmetic a line does, read from the equations it writes.

Only the shape of an equation is read; nothing is evaluated.
"""

import re
from itertools import pairwise
from typing import NamedTuple

OTHER = "other"
"""The label of a line that no kind of step is known for."""
SEVERAL = "calculate"
"""The label of a line with different operations."""
OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}

_SPELLINGS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "×": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "\\approx": "=",
    "≈": "=",
    "\\$": "",
    "$": "",
}
_OF_EQUATIONS = "0123456789.,%()*/+-x \t"
_OPERATOR = re.compile(r"(?<=[\d.)%])[ \t]*([-+*/x])[ \t]*(?=[-\d.(])")
_OPERAND = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_RESULT = re.compile(r"[ \t]*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")
_VARIABLE = re.compile(r"(?:^|[^A-Za-z])[A-Za-z]$|[)}\]]$")
_UNIT = re.compile(r"(?<=\d)[ \t]?/?[A-Za-z][A-Za-z'’]++(?:[ \t/][A-Za-z][A-Za-z'’]++){0,5}(?=[ \t]*(?:[-+*/=]|x[ \t]*[\d.(]))")


class Labelled(NamedTuple):
    """What a line says of itself."""

    label: str
    inputs: tuple[str, ...] = ()
    result: str = ""


def read_operations(text: str) -> Labelled:
    """The operation of the equations in a text: one kind, ``calculate`` for several, ``other`` for none.

    Units after numbers are passed over; an equation with a variable is none.

    >>> read_operations("She sells 16 - 3 - 4 = 9 eggs")
    Labelled(label='subtract', inputs=('16', '3', '4'), result='9')
    >>> read_operations("2 * (3 + 4) = 14").label, read_operations("20 sheep + 5 sheep = 25").label
    ('calculate', 'add')
    >>> read_operations("$20/hour * 35 hours per week = $700").label
    'multiply'
    >>> {read_operations(formula).label for formula in ("let n-1 = 4", "n + 2 - 3 = 4", "f(t) - 3 + 2 = 5")}
    {'other'}
    """
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    found, inputs, result = set[str](), list[str](), ""
    for left, right in pairwise(_UNIT.sub("", text).split("=")):
        equation = _equation(left)
        if operators := _OPERATOR.findall(equation):
            found |= {operator.replace("x", "*") for operator in operators}
            inputs += _OPERAND.findall(equation)
            result = match[1].rstrip(",") if (match := _RESULT.match(right)) else ""
    if not found:
        return Labelled(OTHER)
    return Labelled(OPERATIONS[found.pop()] if len(found) == 1 else SEVERAL, tuple(inputs), result)


def _equation(left: str) -> str:
    """The numbers and signs that end the left side; nothing if they belong to a formula."""
    rest = left.rstrip(_OF_EQUATIONS)
    whole = left[len(rest) :]
    equation = whole.lstrip(" \t,)*/+%x")
    joined = len(equation) == len(whole) and rest[-1:] not in ("", "\n", ":", '"')
    goes_on = whole.lstrip(" \t)")[:1] in tuple("+-*/x") and bool(_VARIABLE.search(rest[-2:]))
    is_formula = joined or goes_on or "x" in _OPERATOR.sub(" ", equation)
    return "" if is_formula else equation
