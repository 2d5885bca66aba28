"""Whether problems solved by the same operations take the same path through the experts.

    python analyses/path_alignment.py RUN [--json] [--rows N]

`correlation` of path distance with distance of operations, by what the path is made of; `nearer` is how much nearer pairs with
the same operations lie.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("path_alignment"))
