"""How often routing points to the step where a solution first goes wrong.

    python analyses/wrong_step_localisation.py RUN [--json] [--rows N]

Compare `located` with `chance`, and its last row with place, length and loss.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("wrong_step_localisation"))
