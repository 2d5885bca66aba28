"""How much work each expert of a checkpoint does.

    python analyses/expert_load.py RUN [--json] [--rows N]

`load` is the share of the layer's choices, `importance` the share of its routing weight, `log2_ratio` the load over the
even share: 1 is twice as much, -1 half. `ci_low` and `ci_high` bound the load of 95 % of bootstraps over sequences.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_load"))
