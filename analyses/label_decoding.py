"""How well a step's kind can be told from its routing, its words, its place, and all together.

    python analyses/label_decoding.py RUN [--json] [--rows N]

`gain` is what a description adds to the words; routing that only repeats them gains nothing.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("label_decoding"))
