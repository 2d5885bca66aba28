"""Whether routing tells where a step ends, beyond the words there.

    python analyses/step_boundaries.py RUN [--json] [--rows N]

`gain` is F1 above chance over that of words alone; distance, token distance and state change never saw a boundary.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("step_boundaries"))
