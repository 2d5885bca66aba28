"""What a benchmark is made of: steps, records, and the records of one source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN = "plain"
"""The format of a record that nothing else is known of."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One reasoning step of a text."""

    label: str
    """What kind of step; for stepbench one of `ling_probe.stepbench.LABELS`, or ``other``."""
    text: str
    """What the step says, without the newlines after it."""
    start: int
    """First character in the solution."""
    stop: int
    """One past the last character, trailing newlines included."""
    inputs: tuple[str, ...] = ()
    """What the step uses, as written."""
    result: str = ""
    """What the step establishes, as written."""
    correct: bool | None = None
    """Whether the step holds; None where nobody can tell."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One problem with its gold solution, or with the one a model gave when somebody evaluated it."""

    id: str
    prompt: str
    solution: str = ""
    answer: str = ""
    family: str = ""
    split: str = ""
    benchmark: str = ""
    steps: tuple[Step, ...] = ()
    """Steps of the solution, in order; a line that only gives the answer is not one of them."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the record, as read."""
    format: str = PLAIN
    """A name in `ling_probe.benchmarks.FORMATS`; it says how an answer is found in a text, and when two are the same."""
    predicted: str = ""
    """What the solution answers, where the source says so."""
    correct: bool | None = None
    """Whether the solution's answer is right, where the source judged it."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and text of each message, where the prompt was a conversation; a chat template is applied to these."""


@dataclass(frozen=True)
class Benchmark:
    """The records of one split, and what identifies the bytes they came from."""

    name: str
    split: str
    records: tuple[Record, ...]
    digest: str
    """sha256 of the file, or of what the hub or the generator gave."""
    format: str = PLAIN
    """A name in `ling_probe.benchmarks.FORMATS`."""
    skipped: int = 0
    """Records that could not be read and were left out, as was asked."""
    problems: tuple[str, ...] = ()
    """What was wrong with the first few of them."""

    def describe(self) -> dict[str, Any]:
        """What the manifest of a run says of its benchmark; what is as usual is left out."""
        facts: dict[str, Any] = {"name": self.name, "split": self.split, "digest": self.digest, "records": len(self.records)}
        facts |= {"format": self.format} if self.format != PLAIN else {}
        return facts | ({"skipped": self.skipped, "problems": list(self.problems)} if self.skipped else {})
