"""Starting processes that import what they run, and nothing else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def nobodys_main() -> Iterator[None]:
    """Let a spawned process import what it runs and not the script that is running here, which may lack a main guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
