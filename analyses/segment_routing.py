"""Whether a fixed set of experts would serve a stretch of tokens.

    python analyses/segment_routing.py RUN [--json] [--rows N]

Compare `f1` with `shuffled`: the best set is found on the tokens it serves, so it is high by chance alone.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("segment_routing"))
