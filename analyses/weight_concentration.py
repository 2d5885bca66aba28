"""How much of a token's routing weight its first, second ... expert carries.

    python analyses/weight_concentration.py RUN [--json] [--rows N]

Ranks are by weight. Slots of a Ling router are in order of choice score, bias included, and say something else.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("weight_concentration"))
