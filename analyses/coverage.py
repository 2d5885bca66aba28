"""How few experts do how much of the work, in the run and in a single sequence.

    python analyses/coverage.py RUN [--json] [--rows N]

Compare `experts` with `floor`: a router without any preference needs that many after as many tokens. Numbers lie between two
whole ones in proportion.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("coverage"))
