"""How much of the work the busier experts of a layer do: a Lorenz curve of each layer's load.

    python analyses/load_curve.py RUN [--json] [--rows N]

`share` is what the least loaded experts, up to this one, have of all choices; between `floor_low` and `floor_high` it shows
nothing: a router without any preference gives that after as many tokens.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("load_curve"))
