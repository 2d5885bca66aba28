"""Which experts of a checkpoint are chosen together, beyond what groups and load make of it.

    python analyses/coactivation.py RUN [--json] [--rows N]

`lift` is log2 of the tokens that chose both over the `expected`, which knows the router's groups. Trust rows with a
small `q`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("coactivation"))
