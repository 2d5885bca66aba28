"""Which layers and experts carry what routing tells of a step's kind.

    python analyses/label_carriers.py RUN [--json] [--rows N]

`lost` are the bits that predictions lose without a layer, an expert, or the first ten; `gain` is what they add to words.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("label_carriers"))
