"""Whether the expert that a token weighs most is the one that writes most.

    python analyses/norm_rank.py RUN [--json] [--rows N]

Needs a run captured with --keep contribution. Compare `top_norm` with `chance`, and `top_contribution` with
`dealt_contribution`: the weight itself is part of a contribution.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("norm_rank"))
