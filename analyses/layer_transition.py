"""Whether an expert of one layer tells which the next layer takes, beyond what the token tells of both.

    python analyses/layer_transition.py RUN [--json] [--rows N]

`log2_ratio` compares with the next layer's choice for the same token in another sequence; `beyond_token` sums a layer up.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("layer_transition"))
