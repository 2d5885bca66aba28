"""What another operation changes in the routing of the same words in the same places.

    python analyses/minimal_pairs.py RUN [--json] [--rows N]

RUN is of stepbench's split `pairs`. `beyond` is how much more changes in the step that needs the operation.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("minimal_pairs"))
