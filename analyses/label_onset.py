"""How early in a step its kind can be told, from the routing of one token and from the text so far.

    python analyses/label_onset.py RUN [--json] [--rows N]

`place` 0 is the token before the step's first; `gain` is what routing adds there to the text.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("label_onset"))
