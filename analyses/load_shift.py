"""Which experts one run uses more, or less, than another.

    python analyses/load_shift.py RUN --against OTHER [--against ANOTHER] [--json] [--rows N]

Runs of the same problems are compared problem by problem (`paired`). `divergence` sums a layer up, in bits.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("load_shift"))
