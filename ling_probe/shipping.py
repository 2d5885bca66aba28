"""Where the files lie that come with the package: beside it in a source checkout, inside it once installed."""

from pathlib import Path

from ling_probe.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
_HOMES = (_PACKAGE.parent, _PACKAGE / "shipped")


def app_path(name: str) -> Path:
    """Path of a file of the explorer.

    Raises:
        UsageError: The installation lacks it.
    """
    for home in _HOMES:
        if (path := home / "apps" / name).is_file():
            return path
    raise UsageError(f"this installation lacks apps/{name}; install ling-probe again")


def shipped_models() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in (_PACKAGE / "checkpoints").glob("*/config.json"))
