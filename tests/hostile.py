"""A run whose every text tries to act on the page that shows it."""

from dataclasses import replace
from itertools import cycle, islice

import numpy as np
from synthetic import synthetic_spec, synthetic_traces

from ling_probe.run import Run

TEXTS = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "$x$",
    ":red[a]",
    "\u202eabc\u2066",
    " **b** [l](http://example.invalid)\n",
    "&lt;i>",
    "'\"><b>",
    ":material/home:",
    "",
    "</script><script>document.title='owned'</script>",
    "\x1b]0;owned\x07\x1b[31mred",
)
LONG = "\u202e<b>x" * 2**18
"""A megabyte and more in one token of the first sequence, after one round of the others."""


def hostile_run(folder, n_sequences=12, more=()) -> Run:
    """Such a run; `more` texts come before the others."""
    texts = (*more, *TEXTS)
    spec = synthetic_spec(name="<b>model</b>")
    run = Run.create(
        folder,
        spec=spec,
        model={"name": "<b>$model$</b>", "verification": {"choices": "<i>9</i>", "differ": ":red[0]", "<u>key</u>": 1}},
        benchmark={"name": "<img src=x onerror=alert(1)>", "split": "$t$"},
        options={},
    )
    traces = synthetic_traces(spec, n_sequences, rng=np.random.default_rng(0))
    run.append([_hostile(number, trace, texts) for number, trace in enumerate(traces)])
    run.finish()
    return run


def _hostile(number, trace, texts):
    text = texts[number % len(texts)]
    tokens = [*islice(cycle(texts), trace.n_tokens)]
    if number == 0:
        tokens[len(texts)] = LONG
    return replace(
        trace,
        sequence_id=f"{number} {text}",
        tokens=tuple(tokens),
        steps=tuple(replace(span, label=texts[span.step]) for span in trace.steps),
        family=texts[number % 3],
        prompt=text,
        completion=text,
        answer=text,
        predicted=text,
    )
