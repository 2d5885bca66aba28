"""Whether the same few experts lead in every family and kind of step.

    python analyses/committee.py RUN [--json] [--rows N]

Compare `jaccard` with `chance` (random committees) and `halves` (two halves of one domain).
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("committee"))
