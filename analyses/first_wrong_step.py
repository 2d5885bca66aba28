"""Whether a first wrong step is routed otherwise than right steps of the same number, words and length.

    python analyses/first_wrong_step.py RUN [--json] [--rows N]

`effect` is in standard deviations of right steps; `raw` has words and length in it.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("first_wrong_step"))
