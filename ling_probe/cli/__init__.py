"""The command line: thin verbs over the package. Nothing heavy is imported before a verb needs it."""

import sys

from ling_probe.cli import asking, capturing, changing, claiming, measuring
from ling_probe.cli.app import app
from ling_probe.cli.showing import clean
from ling_probe.errors import LingProbeError

__all__ = ["app", "asking", "capturing", "changing", "claiming", "main", "measuring"]


def main() -> None:
    """Run the command line; our own errors and the system's refusals are one line and exit status 2."""
    try:
        app()
    except LingProbeError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")


def _fail(message: str) -> None:
    sys.stderr.write(f"ling-probe: {clean(' '.join(message.split()))}\n")
    raise SystemExit(2)
